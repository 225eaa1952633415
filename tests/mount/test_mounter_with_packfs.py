"""The mounter above the real pack filesystem, keeper and worker."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time

import pytest
from support.mounts import content_of, until
from support.packfs import Packfs

from floe.mount.mounter import MountState
from floe.store.errors import BusyError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def packfs(node):
    made = Packfs(node.root)
    yield made
    made.close()


@pytest.fixture
def tree(node, packfs):
    """A tree whose one pack is served, cut off from its content until the gate is opened."""
    tree = node.tree(complete=False)
    (packfs.packs_dir / tree.packs[0].id).hardlink_to(tree.packs[0].data)
    for gate in ("slow", "shut"):
        packfs.gate(tree.packs[0].id, gate)
    packfs.start()
    return tree


def test_an_unmount_with_a_read_in_flight_is_refused_at_once(node, packfs, tree):
    mounter, pack = node.mounter(), tree.packs[0].id
    where = mounter.mount(tree, "a")
    assert mounter.check(tree.digest) is MountState.HEALTHY
    with subprocess.Popen(["cat", where / "file0"], stdout=subprocess.DEVNULL) as cat:
        packfs.wait_inflight(pack, 1)
        cat.kill()
        cat.wait(20)
    start = time.monotonic()
    with pytest.raises(BusyError):
        mounter.release(tree.digest, "a")
    assert time.monotonic() - start < 8  # the deadline is ten
    packfs.open_gate(pack)
    until(lambda: not packfs.client.inflight([pack]))
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_a_worker_that_dies_leaves_the_tree_busy_and_the_read_whole(node, packfs, tree):
    mounter, pack = node.mounter(), tree.packs[0].id
    where = mounter.mount(tree, "a")
    with subprocess.Popen(["sha256sum", where / "file0"], stdout=subprocess.PIPE) as reader:
        packfs.wait_inflight(pack, 1)
        packfs.kill_worker()
        with pytest.raises(BusyError):  # whether nobody answers yet or the successor does
            mounter.release(tree.digest, "a")
        packfs.wait_inflight(pack, 1)
        with pytest.raises(BusyError):
            mounter.release(tree.digest, "a")
        packfs.open_gate(pack)
        digest = reader.communicate(timeout=20)[0].split()[0].decode()
    assert digest == hashlib.sha256(content_of("tree", 0, 1 << 20)).hexdigest()
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING
