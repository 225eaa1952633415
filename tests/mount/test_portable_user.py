"""`floe model mount --portable` of a user who is not root: through fusermount3, with a cache of the user's own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.floe_node import Node, wait_until
from support.mounts import content_of
from support.ordinary_user import UID, OrdinaryUser

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming an ordinary user needs root")
MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two models in a store: big files, small files, holes, links."""
    node = Node(tmp_path_factory.mktemp("store"))
    for number, name in enumerate(("one", "two")):
        folder = node.home / name
        (folder / "sub").mkdir(parents=True)
        (folder / "weights").write_bytes(content_of(name, number, 20 * MIB))
        (folder / "text").write_text(name)
        os.link(folder / "text", folder / "sub" / "again")
        (folder / "link").symlink_to("sub/again")
        os.setxattr(folder / "text", "user.kept", b"1")
        with (folder / "sparse").open("wb") as file:
            file.truncate(12 * MIB)
            file.seek(11 * MIB)
            file.write(b"end")
        os.utime(folder / "text", ns=(5, 1_600_000_000_123_456_789))
        node.floe("model", "push", folder, name)
    return node


@pytest.fixture
def user(store):
    made = OrdinaryUser()
    made.take_store(store.store)
    yield made
    made.close()


FACTS = """
import json, os
from pathlib import Path
from support.trees import disk_facts
facts = disk_facts(Path(sys.argv[1]))
inodes = {p: os.lstat(os.fsencode(sys.argv[1]) + b"/" + p).st_ino for p in facts}
print(repr((facts, inodes)))
"""


@pytest.mark.slow
def test_the_same_tree_as_root_mounts(user, store, tmp_path):
    user.floe("model", "mount", "--portable", "one", user.home / "m")
    shown = user.python(FACTS, user.home / "m")
    store.floe("model", "mount", "one", tmp_path / "m")
    try:
        expected = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests')\n{FACTS}", tmp_path / "m"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        store.floe("umount", tmp_path / "m")
    assert shown == expected
    (mount,) = user.json("status")["mounts"]
    assert (mount["by"], mount["mode"], mount["models"]) == (
        "portable",
        "store",
        {str(user.home / "m"): "one:latest"},
    )
    user.floe("umount", user.home / "m")
    assert user.servers() == []
    assert user.mounts() == []
    assert not (user.home / "m").exists()


def test_all_is_the_user_s_own_and_read_only(user):
    user.floe("model", "mount", "--portable", "one", user.home / "m")
    assert user.cache.stat().st_uid == UID
    assert user.cache.stat().st_mode & 0o77 == 0
    assert list(user.cache.glob("packs/*/data"))
    done = user.run("touch", user.home / "m" / "new", code=1)
    assert os.strerror(errno.EROFS) in done.stderr
    assert {"ro", "nosuid", "nodev"} <= set(
        user.run("findmnt", "-no", "OPTIONS", user.home / "m").stdout.strip().split(",")
    )
    as_root = subprocess.run(
        [*user.command()[:2], "ls", user.home / "m"], capture_output=True, text=True, check=False, timeout=20
    )
    assert "Permission denied" in as_root.stderr
    user.floe("umount", user.home / "m")


@pytest.mark.slow
def test_mounts_share_one_cache_and_survive_the_one_that_writes_it(user, store):
    for name in ("one", "two"):
        user.floe("model", "mount", "--portable", name, user.home / name)
    first, second = sorted(user.servers())
    shutil.copy(store.home / "two" / "weights", user.home / "expected")
    (user.home / "expected").chmod(0o644)
    reads = subprocess.Popen(user.command("cmp", user.home / "two" / "weights", user.home / "expected"))
    os.kill(first, signal.SIGKILL)
    assert reads.wait(60) == 0
    wait_until(lambda: user.servers() == [second])
    user.run("cmp", user.home / "two" / "weights", user.home / "expected")
    assert user.run("ls", user.home / "one", code=2).stderr.endswith("Transport endpoint is not connected\n")
    for name in ("one", "two"):
        user.floe("umount", user.home / name)
    assert user.servers() == []


def test_a_busy_mount_stays_and_says_who_uses_it(user):
    place = user.home / "m"
    user.floe("model", "mount", "--portable", "one", place)
    with subprocess.Popen(
        user.command("sh", "-c", f"exec 3<{place}/weights; echo open; read -r end"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"open\n"
        refused = user.floe("umount", place, code=1)
        assert "is in use" in refused.stderr
        assert "sh (pid" in refused.stderr
        holder.communicate(b"\n")
    user.floe("umount", place)
    assert user.servers() == []


def test_unmounted_by_hand_its_process_ends(user):
    place = user.home / "m"
    place_json = user.json("model", "mount", "--portable", "one", place)
    assert place_json["mountpoint"] == str(place)
    user.run("fusermount3", "-u", place)
    wait_until(lambda: not user.servers())
    user.floe("umount", place)
    assert json.loads(user.floe("status", "--json").stdout)["mounts"] == []


@pytest.mark.slow
def test_what_cannot_be_is_said(user, tmp_path):
    refused = user.floe("model", "mount", "one", user.home / "m", code=1)
    assert "needs root" in refused.stderr
    assert "--portable" in refused.stderr
    assert not (user.home / "m").exists()
    refused = user.floe("model", "mount", "--portable", "none", user.home / "m", code=1)
    assert "none" in refused.stderr
    foreign = user.home / "foreign"
    foreign.mkdir()
    refused = user.floe("model", "mount", "--portable", "one", foreign, code=1)
    assert "must be yours" in refused.stderr
    argv = (sys.executable, "-m", "floe", "model", "mount", "--portable", "one", user.home / "m")
    refused = user.run("env", "PATH=/nowhere", *argv, code=1)
    assert "package fuse3" in refused.stderr
    refused = user.floe("umount", user.home / "m", code=1)
    assert "no model is mounted" in refused.stderr
    assert user.mounts() == []
    assert user.servers() == []


def test_without_pyfuse3_the_extra_is_named(user):
    broken = user.home / "broken"
    broken.mkdir()
    (broken / "pyfuse3.py").write_text("raise ImportError('no such module')")
    user.environ["PYTHONPATH"] = str(broken)
    refused = user.floe("model", "mount", "--portable", "one", user.home / "m", code=1)
    assert "pip install '.[portable]'" in refused.stderr
    assert not (user.home / "m").exists()


@pytest.mark.slow
def test_another_store_wants_another_cache(user):
    user.floe("model", "mount", "--portable", "one", user.home / "m")
    user.run("cp", "-r", user.home / "store", user.home / "other")
    store = f"file://{user.home}/other"
    refused = user.floe("model", "mount", "--portable", "--store", store, "two", user.home / "n", code=1)
    assert "another store" in refused.stderr
    assert "--cache-dir" in refused.stderr
    user.floe("model", "mount", "--portable", "--store", store, "--cache-dir", user.home / "c", "two", user.home / "n")
    user.cache.rename(user.home / "away")  # unmounting does not need it
    for place in ("m", "n"):
        user.floe("umount", user.home / place)


def test_content_that_cannot_be_had_is_eio_until_it_can(user):
    user.environ["FLOE_READ_DEADLINE"] = "1"
    place = user.home / "m"
    user.floe("model", "mount", "--portable", "one", place)
    packs, away = user.home / "store" / "packs", user.home / "away"
    packs.rename(away)
    assert "Input/output error" in user.run("cat", place / "weights", code=1).stderr
    assert user.run("cat", place / "link", code=1).stdout == ""  # not cached either
    assert user.run("stat", "-c", "%s", place / "weights").stdout == f"{20 * MIB}\n"
    away.rename(packs)
    assert user.run("cat", place / "link").stdout == "one"
    user.run("cmp", "-n", str(20 * MIB), place / "weights", place / "weights")
    user.floe("umount", place)
