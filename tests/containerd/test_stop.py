"""`floe packfs` told to stop while a container reads: reads wait, nothing of Floe's does, and the next start resumes."""

import os
import signal
import time

import grpc
import pytest
from support.containerd import versions
from support.mounts import until
from support.slow_node import MIB, SlowNode
from support.snapshots import status

from floe.mount.mounter import TreeMounter
from floe.protos.gen.containerd import snapshots_pb2 as pb
from floe.store.cache import NodeCache
from floe.store.errors import BusyError, DeadlineError

pytestmark = pytest.mark.timeout(110)
# Seconds that anything of Floe's own may take while the pack filesystem is silent.
QUICK = 5.0


@pytest.fixture
def node(tmp_path):
    made = SlowNode(tmp_path, versions()[-1], model=16 * MIB, layer=8 * MIB)
    yield made
    made.close()


@pytest.fixture
def model(node, tmp_path):
    """A model nobody reads, mounted for a user; its mountpoint."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(MIB))
    node.daemons.floe("model", "push", folder, "other:1")
    node.daemons.floe("model", "mount", "other:1", tmp_path / "m")
    yield tmp_path / "m"
    node.answer()
    if os.path.ismount(tmp_path / "m"):
        node.daemons.floe("umount", tmp_path / "m")


def stop(node):
    """SIGTERM with packs in use; returns once the keeper has said what that means."""
    worker, keeper = node.pid("worker.pid"), node.daemons.packfs
    keeper.send_signal(signal.SIGTERM)
    until(lambda: "packs are in use" in node.daemons.log("packfs").read_text(), 20)
    assert keeper.poll() is None
    assert f"process {keeper.pid}" in node.daemons.log("packfs").read_text()
    assert node.serving() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def running(node, container):
    return node.cri.status(container).state == node.cri.pb.CONTAINER_RUNNING


class Quickly:
    """A block that must not take long."""

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, kind, value, trace):
        took = time.monotonic() - self.start
        assert took < QUICK, f"took {took:.1f} s"


@pytest.mark.slow
def test_a_stopped_packfs_resumes_and_nothing_of_floe_hangs_meanwhile(node, model):
    container = node.read()
    first = node.daemons.packfs
    stop(node)
    assert running(node, container)

    mounter = TreeMounter(node.daemons.run_dir, NodeCache(node.daemons.cache), deadline=2)
    with Quickly():
        assert mounter.sweep() == []
    assert len(mounter.mounts()) == 4
    for record in mounter.mounts():
        with Quickly(), pytest.raises(DeadlineError):
            mounter.check(record.digest)
        with Quickly(), pytest.raises(BusyError), mounter.locked(record.digest):
            mounter.unmount(record.digest)
    with Quickly():
        assert node.daemons.json("status")["packfs"]["running"] is False
    with Quickly():
        assert "floe packfs" in node.daemons.floe("umount", model, code=1).stderr
    with Quickly():
        node.daemons.restart_snapshotter()
    client = node.daemons.client
    top = next(info.parent for info in client.list() if info.kind == pb.ACTIVE and "floe/" in info.parent)
    with Quickly():
        client.cleanup()
    with Quickly():
        assert status(client.view, "during", top) is grpc.StatusCode.UNAVAILABLE
    with Quickly():
        client.usage(top)
    with Quickly():
        client.prepare("ordinary")
        client.remove("ordinary")
        client.cleanup()

    assert running(node, container)
    node.daemons.packfs = node.daemons.start("packfs")
    assert first.wait(20) == 0
    client.view("after", top)
    client.remove("after")
    node.finish(container)
    assert (model / "weights.bin").stat().st_size == MIB
    until(lambda: not mounter.stuck())
    node.daemons.floe("umount", model)


def test_force_ends_the_readers_and_the_next_packfs_serves_new_containers(node):
    container = node.read()
    stop(node)
    with Quickly():
        node.daemons.floe("packfs", "--force")
    assert node.daemons.packfs.wait(20) == 0
    assert node.cri.wait(container) != 0  # its reads failed, if not its own program's pages
    node.daemons.packfs = node.daemons.start("packfs")
    # The snapshotter takes trees found healthy for healthy a few seconds more: a kubelet tries again, and so do we.
    pod = node.cri.run_pod("again")
    until(lambda: node.cri.run(pod, node.reference, ["true"])[0] == 0, 20)
    node.finish(node.read())
