"""How long a request may wait, and how many; against the snapshotter's own socket."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.mounts import until
from support.snapshots import REF, DirectoryLayers, Status, nodes, status

from floe.snapshotter import lazymounts
from floe.snapshotter.service import THREADS
from floe.snapshotter.turns import Gate, Turns
from floe.store import mounttable
from floe.store.errors import BusyError, DeadlineError, DiskError, NoSpaceError, UnavailableError
from floe.store.stub import ANNOTATION

LAYERS = 12


class LayersTogether(DirectoryLayers):
    """Every fetch waits until `together` run at once."""

    together = 1

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()
        self.running = 0

    def fetch(self, tree, deadline):
        with self.changed:
            self.running += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.running >= self.together, 30)
        super().fetch(tree, deadline)


@pytest.fixture
def make(tmp_path):
    with nodes(tmp_path) as make:
        yield make


def index(node, name):
    """Put a layer into the store; its chain id."""
    folder = node.base / "trees" / name
    folder.mkdir(parents=True)
    (folder / name).touch()
    node.layers.remote[name] = folder
    chain = f"sha256:{sum(map(ord, name)):064x}"
    node.layers.chains[chain] = name
    return chain


def pull(node, count):
    """An image of `count` lazy layers; the top snapshot's name."""
    parent = ""
    for number in range(count):
        chain = index(node, f"tree-{chr(97 + number)}")
        assert status(node.client.prepare, f"extract {number}", parent, {REF: chain}) is Status.ALREADY_EXISTS
        (found,) = node.client.list(f'labels."{REF}"=={chain},parent=="{parent}"')
        parent = found.name
    return parent


def reboot(node):
    """As after a reboot with an empty node cache: nothing can be mounted without the store."""
    node.stop()
    for mount in reversed(mounttable.mounts()):
        if mount.target.startswith(f"{node.config.root}/"):
            node.layers.unbind(type(node.base)(mount.target))
    node.layers.trees.clear()
    node.start()


def test_a_chain_s_trees_are_fetched_side_by_side_within_one_deadline(make):
    node = make(LayersTogether(), prepare_timeout=30)
    top = pull(node, LAYERS)
    reboot(node)
    node.layers.running, node.layers.together = 0, LAYERS
    node.client.prepare("c", top)
    assert node.layers.running == LAYERS


def test_a_silent_store_holds_up_a_chain_for_one_deadline(make):
    node = make(prepare_timeout=0.5)
    top = pull(node, LAYERS)
    reboot(node)
    node.layers.gate = threading.Event()
    started = time.monotonic()
    for call in (node.client.prepare, node.client.view):
        assert status(call, "c", top) is Status.UNAVAILABLE
    assert time.monotonic() - started < 0.5 * LAYERS  # one deadline for each layer


def test_the_mount_table_is_read_once_for_a_chain(make, monkeypatch):
    node = make()
    top = pull(node, LAYERS)
    node.snapshotter.lazy._present.clear()
    read = []
    real = lazymounts._mount_points
    monkeypatch.setattr(lazymounts, "_mount_points", lambda: read.append(1) or real())
    node.client.prepare("c", top)
    assert len(read) == 1
    node.client.prepare("d", top)
    assert len(read) == 1


@pytest.mark.parametrize("how", ["layer", "labelled layer", "model", "parent"])
def test_any_number_of_requests_for_one_tree_leaves_threads_for_others(make, how):
    node = make(prepare_timeout=25)
    chain = index(node, "tree-a")
    top, labels = "", {REF: chain}
    if how == "parent":
        assert status(node.client.prepare, "extract", "", labels) is Status.ALREADY_EXISTS
        top, labels = node.client.list()[0].name, {}
        reboot(node)
    elif how != "layer":
        labels = {ANNOTATION: "a" * 64} | ({REF: chain} if how == "labelled layer" else {})
    gate = node.layers.gate = threading.Event()
    count = 2 * THREADS
    with ThreadPoolExecutor(count) as pool:
        before = node.layers.network
        waiting = [pool.submit(status, node.client.prepare, f"k{number}", top, labels) for number in range(count)]
        until(lambda: node.layers.network > before)
        for number in range(5):  # who waits for a thread does so until the gate is open
            node.client.prepare(f"ordinary {number}", "")
            node.client.stat(f"ordinary {number}")
        gate.set()
        answers = {answer.result() for answer in waiting}
    allowed = {Status.ALREADY_EXISTS, Status.OK} if how == "layer" else {Status.UNAVAILABLE, Status.OK}
    assert answers <= allowed


def test_turns_end_at_their_deadline_and_gates_when_full():
    turns = Turns("thing")
    with turns.take("a"), turns.take("b", 0), pytest.raises(DeadlineError, match="thing a"), turns.take("a", 0.01):
        pass
    with turns.take("a", 0):
        pass
    assert turns._wanted == {}
    gate = Gate(1, "somebody")
    with gate.enter(), pytest.raises(BusyError, match="1 requests wait for somebody"), gate.enter():
        pass
    with gate.enter():
        pass


@pytest.mark.parametrize("error", [NoSpaceError("full"), DiskError("broken")])
def test_the_node_s_own_disk_is_no_failing_store(make, error):
    node = make()
    chain = index(node, "tree-a")
    node.layers.fail["fetch"] = error
    assert status(node.client.prepare, "k", "", {REF: chain}) is Status.OK
    figures = node.snapshotter.metrics()
    assert figures.breaker == "closed"
    assert {reason: count for reason, count in figures.fallbacks.items() if count} == {"cache": 1}
    # Nor does it tell that a store that failed is well again.
    node.layers.fail["resolve"] = UnavailableError("down")
    assert status(node.client.prepare, "k1", "", {REF: chain}) is Status.OK
    del node.layers.fail["resolve"]
    node.snapshotter.resolver.breaker._cool_down = 0
    assert status(node.client.prepare, "k2", "", {REF: chain}) is Status.OK
    assert node.snapshotter.metrics().breaker == "probing"
    assert node.snapshotter.metrics().fallbacks["cache"] == 2
    del node.layers.fail["fetch"]
    assert status(node.client.prepare, "k3", "", {REF: chain}) is Status.ALREADY_EXISTS
    assert node.snapshotter.metrics().breaker == "closed"
