"""Every daemon killed with -9 and started again while a container reads what is not cached, fetches in flight.

The store is a bucket, the index Redis: standalone, and a cluster with TLS and users.
"""

import pytest
from support import fleet
from support.containerd import versions
from support.slow_node import SlowNode

pytestmark = pytest.mark.timeout(110)
KILLS = 6


@pytest.fixture
def node(tmp_path, version, index):
    made = SlowNode(tmp_path, version, environ={"FLOE_INDEX": fleet.index_url(index)})
    yield made
    made.close()


def on(*pairs):
    """Versions of containerd and kinds of index."""
    return pytest.mark.parametrize(("version", "index"), pairs, ids=str)


REDIS, CLUSTER = fleet.INDEXES


@on(*(pytest.param(version, REDIS, marks=pytest.mark.slow) for version in versions()[:-1]))
def test_containerd_and_snapshotter_are_killed_under_a_reader(node):
    container = node.read()
    worker = node.serving()
    kill_containerd_and_snapshotter(node, container, worker)
    node.finish(container)


def kill_containerd_and_snapshotter(node, container, worker):
    for _ in range(2):
        node.kill_snapshotter()
        node.kill_containerd()
    node.wait_inflight()
    assert node.cri.status(container).state == node.cri.pb.CONTAINER_RUNNING
    assert node.serving() == worker


@on(*((version, CLUSTER) for version in versions()[-1:]))
def test_every_daemon_is_killed_under_a_reader(node):
    container = node.read()
    worker = node.serving()
    kill_containerd_and_snapshotter(node, container, worker)
    for _ in range(2):
        node.kill_keeper()
        assert node.serving() == worker  # adopted
    node.kill_worker()  # no child of this keeper
    node.kill_keeper()
    status = node.packfs.status()
    assert status["workers"] == 2
    for _ in range(KILLS):
        node.kill_worker()
    node.finish(container)
    status = node.packfs.status()
    assert status["workers"] == KILLS + 2
    assert status["replayers"] >= 1 + KILLS / 2  # most kills left reads to answer
    assert status["errors"] == 0
