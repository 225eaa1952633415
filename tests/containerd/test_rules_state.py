"""What lasts: labels, usage, restarts, crashes, user namespaces; against the snapshotter's own socket."""

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from support.snapshots import Node, Status, mounted, status

from floe.snapshotter.metastore import Metastore
from floe.snapshotter.mounts import GID_MAPPING, UID_MAPPING
from floe.snapshotter.schema import SCHEMA_VERSION
from floe.snapshotter.service import LIST_BLOCK, server
from floe.store.errors import BadInputError, BusyError, DamagedError, NoSpaceError, UnsupportedError


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.stop()


def test_long_lists_come_in_blocks(node):
    names = {f"v {number}" for number in range(2 * LIST_BLOCK + 1)}
    for name in names:
        node.client.view(name, "")
    assert node.client.names() == names


def test_malformed_filter_is_invalid_argument(node):
    assert status(node.client.list, "name=") is Status.INVALID_ARGUMENT


def test_update_of_anything_but_labels_is_invalid_argument(node):
    node.client.prepare("a", "", {"k": "1", "j": "1"})
    before = node.client.stat("a")
    for path in ("parent", "kind", "name", "created_at"):
        assert status(node.client.update, "a", {"k": "2"}, path) is Status.INVALID_ARGUMENT
    assert node.client.stat("a") == before
    after = node.client.update("a", {"k": "", "new": "n"}, "labels.k", "labels.new")
    assert dict(after.labels) == {"j": "1", "new": "n"}
    assert after.created_at == before.created_at
    assert after.updated_at.ToNanoseconds() > before.updated_at.ToNanoseconds()


def test_commit_replaces_labels(node):
    node.client.prepare("a", "", {"only": "active"})
    node.client.commit("c", "a", {"k": "v"})
    assert dict(node.client.stat("c").labels) == {"k": "v"}


def test_label_longer_than_containerd_allows(node):
    assert status(node.client.prepare, "a", "", {"k": "v" * 4096}) is Status.INVALID_ARGUMENT
    assert node.client.names() == set()


def test_usage_counts_blocks_and_each_hard_link_once(node):
    upper = Path(node.client.prepare("a", "")[0].source)
    (upper / "big").write_bytes(os.urandom(1 << 20))
    os.link(upper / "big", upper / "again")
    with (upper / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (upper / "d").mkdir()
    du = int(subprocess.run(["du", "-s", "-B1", upper], capture_output=True, check=True).stdout.split()[0])
    usage = node.client.usage("a")
    assert (usage.size, usage.inodes) == (du, 4)
    node.client.commit("c", "a")
    assert node.client.usage("c") == usage
    # Measured once: what somebody does to a committed layer is not asked for again.
    shutil.rmtree(upper / "d")
    assert node.client.usage("c") == usage
    node.client.view("v", "c")
    assert node.client.usage("v").size == 0


def test_restart_keeps_names_mounts_and_usage(node):
    node.layer("one", files={"a": "1"})
    mounts = node.client.prepare("active", "one", {"k": "v"})
    before = sorted((info.SerializeToString(deterministic=True) for info in node.client.list()), key=bytes)
    node.restart()
    after = sorted((info.SerializeToString(deterministic=True) for info in node.client.list()), key=bytes)
    assert after == before
    assert node.client.mounts("active") == mounts


def test_directories_half_made_by_a_crash_are_deleted(node):
    node.layer("one", files={"a": "1"})
    node.stop()
    snapshots = node.config.root / "s"
    for name in ("new-x", "77", "2"):
        (snapshots / name / "fs").mkdir(parents=True)
    node.start()
    assert {path.name for path in snapshots.iterdir()} == {"1"}
    # An id that a crash had used already is free again.
    assert Path(node.client.prepare("a", "")[0].source).parent.name == "2"


def test_failed_prepare_leaves_no_directory(node):
    assert status(node.client.prepare, "a", "", {UID_MAPPING: "nonsense"}) is Status.INVALID_ARGUMENT
    (node.config.root / "s" / "1").mkdir()
    (node.config.root / "s" / "1" / "in the way").touch()
    assert status(node.client.prepare, "a", "") is Status.UNAVAILABLE
    assert node.client.names() == set()


def test_user_namespaces_are_honoured(node):
    node.layer("one", files={"a": "1"})
    labels = {UID_MAPPING: "0:100000:65536", GID_MAPPING: "0:200000:65536"}
    for parent in ("", "one"):
        (mount,) = node.client.prepare(f"k {parent}", parent, labels)
        assert list(mount.options[:2]) == ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]
        upper = node.upper([mount]).stat()
        assert (upper.st_uid, upper.st_gid) == (100000, 200000)


def test_pack_filesystem_stays_outside_what_containerd_idmaps(node):
    config = node.config
    with pytest.raises(BadInputError, match="inside root"):
        type(config)(**{**vars(config), "run_dir": config.root / "run"}).check()


def test_image_volumes_get_plain_mounts(node):
    node.layer("one", files={"a": "1"})
    (mount,) = node.client.prepare("/run/containerd/volumes/1 2", "one")
    assert mount.type == "overlay"
    with mounted([mount], node.base) as root:
        assert (root / "a").read_text() == "1"


def test_second_server_on_a_socket_is_refused(node):
    second = server(node.config.address, node.snapshotter)
    with pytest.raises(BusyError, match="another process listens"):
        second.start()
    node.client.prepare("still served", "")


def test_damaged_database_is_named(tmp_path):
    path = tmp_path / "metadata.db"
    path.write_bytes(b"not a database, surely" * 1000)
    with pytest.raises(DamagedError, match=r"metadata\.db"):
        Metastore(path)


def test_newer_database_is_refused(tmp_path):
    path = tmp_path / "metadata.db"
    Metastore(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(UnsupportedError, match="schema version"):
        Metastore(path)


def test_full_disk_is_named_and_changes_nothing(node):
    meta = node.snapshotter._meta
    pages = meta._db.execute("PRAGMA page_count").fetchone()[0]
    meta._db.execute(f"PRAGMA max_page_count = {pages}")
    refused = 0
    for number in range(200):
        if status(node.client.prepare, "k" * 500 + str(number), "", {"l": "v" * 3000}) is Status.RESOURCE_EXHAUSTED:
            refused += 1
    assert refused
    meta._db.execute("PRAGMA max_page_count = 1000000")
    assert len(node.client.names()) == 200 - refused
    assert len(list((node.config.root / "s").iterdir())) == 200 - refused
    node.client.prepare("again", "")


def test_a_database_that_cannot_be_written_refuses_and_loses_nothing(node):
    node.client.prepare("before", "")
    node.snapshotter._meta._db.execute("PRAGMA query_only = 1")
    assert status(node.client.prepare, "meanwhile", "") is Status.UNAVAILABLE
    assert status(node.client.remove, "before") is Status.UNAVAILABLE
    assert node.client.mounts("before")  # containers that run go on, and start again
    node.snapshotter._meta._db.execute("PRAGMA query_only = 0")
    assert set(node.client.names()) == {"before"}
    node.client.prepare("meanwhile", "")


def test_errors_of_the_disk_have_their_own_class(node, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(NoSpaceError, match="new directory"):
        node.snapshotter.prepare("a", "", {})


def test_commit_of_an_unknown_key_as_a_taken_name(node):
    node.layer("one")
    node.client.view("v", "one")
    # In overlayfs's order: the key, the name, the kind.
    assert status(node.client.commit, "one", "nobody") is Status.NOT_FOUND
    assert status(node.client.commit, "one", "v") is Status.ALREADY_EXISTS
    assert status(node.client.commit, "two", "v") is Status.FAILED_PRECONDITION


def test_database_of_the_version_before_is_brought_up_to_date(node):
    node.layer("one", files={"a": "1"})
    node.stop()
    path = node.config.root / "metadata.db"
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE snapshots DROP COLUMN remapped")
        db.execute("PRAGMA user_version = 1")
    db.close()
    node.start()
    node.client.prepare("x-remap", "one")
    node.client.commit("x", "x-remap")
    assert node.client.names() == {"one", "x"}
    assert node.snapshotter.stat("x").remapped
    assert not node.snapshotter.stat("one").remapped
