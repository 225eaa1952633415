"""What Cleanup gives back, whatever it meets; against the snapshotter's own socket."""

import logging
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.mounts import until
from support.snapshots import REF, Node, Status, status

from floe.snapshotter import daemon
from floe.snapshotter.removal import remove_tree
from floe.store import mounttable
from floe.store.errors import CancelledError, UnavailableError

# More than Python's recursion limit, and than the file descriptors a process may have.
DEEP = 1200
CHAIN = "sha256:" + "a" * 64
CHAIN_2 = "sha256:" + "b" * 64


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path / "n", prepare_timeout=0.5)
    yield node
    if node.layers.gate is not None:
        node.layers.gate.set()
    node.stop()
    node.layers.close()
    # Should a test fail: pytest would fail, too, at deleting deep directories.
    subprocess.run(["rm", "-rf", "--one-file-system", str(tmp_path / "n")], check=True)


def dig(directory, depth=DEEP):
    """Nest directories with a file in each, as a container can."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def removed(node, *keys):
    """Prepare and remove these; their upper directories."""
    uppers = [node.upper(node.client.prepare(key, "")) for key in keys]
    for key in keys:
        node.client.remove(key)
    return uppers


def lazy(node, chain, tree):
    """Pull a layer lazily; its snapshot's name."""
    folder = node.base / "trees" / tree
    folder.mkdir(parents=True)
    node.layers.remote[tree] = folder
    node.layers.chains[chain] = tree
    assert status(node.client.prepare, f"extract {chain}", "", {REF: chain}) is Status.ALREADY_EXISTS
    return node.client.list(f'labels."{REF}"=={chain}')[0].name


def ids(node):
    return {path.name for path in (node.config.root / "s").iterdir()}


def mounts_below(path):
    return [mount.target for mount in mounttable.mounts() if Path(mount.target).is_relative_to(path)]


def test_deep_directories_are_deleted_and_hold_up_nothing(node):
    old, deep = removed(node, "old", "deep")
    dig(deep)
    node.client.cleanup()
    assert not old.exists()
    assert ids(node) == set()
    assert not any(node.snapshotter.metrics().counters.values())


def test_deep_directories_set_aside_by_a_crash_are_deleted(node):
    node.stop()
    stray = node.config.root / "s" / "77" / "fs"
    stray.mkdir(parents=True)
    dig(stray)
    node.start()
    assert ids(node) == set()


def test_removal_follows_no_links_and_ends_when_told(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    doomed = tmp_path / "doomed"
    (doomed / "in").mkdir(parents=True)
    (doomed / "link").symlink_to(outside)
    (doomed / "in" / "link").symlink_to("/")
    os.mkfifo(doomed / "fifo")
    seen = []

    def check():
        seen.append(1)
        if len(seen) == 2:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        remove_tree(doomed, check)
    assert doomed.exists()
    remove_tree(doomed, lambda: None)
    assert not doomed.exists()
    assert (outside / "kept").exists()
    remove_tree(doomed, lambda: None)
    (tmp_path / "to").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        remove_tree(tmp_path / "to", lambda: None)
    assert (outside / "kept").exists()


def test_one_bad_snapshot_keeps_no_other_from_being_cleaned_up(node, monkeypatch, caplog):
    removed(node, "old", "bad", "young")
    directories = node.snapshotter._directories
    real = directories.remove

    def remove(path):
        if path.name == "2":
            raise RuntimeError("nobody thought of this")
        real(path)

    monkeypatch.setattr(directories, "remove", remove)
    with caplog.at_level(logging.WARNING):
        node.client.cleanup()
    assert ids(node) == {"2"}
    assert node.snapshotter.metrics().counters["cleanup_failed"] == 1
    assert "nobody thought of this" in caplog.text
    monkeypatch.undo()
    node.client.cleanup()
    assert ids(node) == set()


def test_an_error_in_the_clean_up_does_not_end_the_remounting(monkeypatch):
    stop, tried = threading.Event(), []

    class Sick:
        def tidy(self):
            raise RuntimeError("tidy")

        def remount(self, failed):
            tried.append(failed)
            if len(tried) == 1:
                raise RuntimeError("remount")
            return []

    monkeypatch.setattr(daemon, "_FIRST_PAUSE", 0.01)
    daemon._in_background(Sick(), ["s"], stop)
    assert tried == [["s"], ["s"]]


def test_a_stop_ends_a_clean_up_between_two_files(node):
    (upper,) = removed(node, "big")
    for number in range(100):
        (upper / str(number)).touch()
    node.snapshotter.wind_down()
    node.client.cleanup()
    assert len(list(upper.iterdir())) == 100
    node.restart()
    assert ids(node) == set()


def test_each_clean_up_sweeps_what_nobody_owns(node):
    before = node.layers.swept
    node.client.cleanup()
    assert node.layers.swept == before + 1


def fail_at_start(node, *names):
    """Restart as after a reboot, with nothing in the node cache; the snapshots that could not be mounted."""
    node.stop()
    for target in mounts_below(node.config.root):
        node.layers.unbind(Path(target))
    node.layers.trees.clear()
    for owners in node.layers.owners.values():
        owners.clear()
    node.start()
    assert {found.name for found in node.failed} == set(names)


def test_remounting_brings_no_removed_snapshot_back(node):
    one, two = lazy(node, CHAIN, "one"), lazy(node, CHAIN_2, "two")
    fail_at_start(node, one, two)
    assert node.snapshotter.metrics().unmounted == 2
    gone = next(found for found in node.failed if found.name == two)
    failed = sorted(node.failed, key=lambda found: found.name != one)
    gate = node.layers.gate = threading.Event()
    asked = node.layers.network
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(node.snapshotter.remount, failed)
        until(lambda: node.layers.network > asked)
        node.client.remove(two)
        assert node.snapshotter.metrics().unmounted == 1
        node.client.cleanup()
        gate.set()
        work.result()
    assert not any(str(gone.id) == Path(target).parent.name for target in mounts_below(node.config.root))
    assert not node.layers.owners["two"]
    assert str(gone.id) not in ids(node)


@pytest.mark.parametrize("call", ["prepare", "mounts", "remount"])
def test_a_snapshot_removed_while_its_tree_is_fetched_stays_removed(node, call):
    name = lazy(node, CHAIN, "one")
    if call == "mounts":
        node.client.prepare("active", name)
    fail_at_start(node, name)
    node.snapshotter.lazy._timeout = 20
    gate = node.layers.gate = threading.Event()
    asked = node.layers.network
    calls = {
        "prepare": lambda: status(node.client.prepare, "active", name),
        "mounts": lambda: status(node.client.mounts, "active"),
        "remount": lambda: node.snapshotter.remount(node.failed),
    }
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(calls[call])
        until(lambda: node.layers.network > asked)
        if call == "mounts":
            node.client.remove("active")
        node.client.remove(name)
        node.client.cleanup()
        assert ids(node) == set()
        gate.set()
        assert work.result() == ([] if call == "remount" else Status.NOT_FOUND)
    assert mounts_below(node.config.root) == []
    assert not node.layers.owners["one"]
    assert ids(node) == set()


def test_uses_of_snapshots_nobody_knows_are_ended(node):
    name = lazy(node, CHAIN, "one")
    kept = set(node.layers.owners["one"])
    node.layers.owners["one"] |= {"snapshot-77", "model-1", "snapshot-x"}
    node.client.cleanup()
    assert node.layers.owners["one"] == kept | {"model-1", "snapshot-x"}
    node.layers.owners["one"].add("snapshot-78")
    node.layers.fail["release"] = UnavailableError("not now")
    node.client.cleanup()
    del node.layers.fail["release"]
    node.restart()
    assert node.layers.owners["one"] == kept | {"model-1", "snapshot-x"}
    assert node.client.stat(name)
