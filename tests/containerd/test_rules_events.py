"""What a Prepare tells: an event each, a histogram by outcome, and the start of a container to whoever reads its trees."""

import pytest
from support.snapshots import REF, Status, nodes, status

from floe.snapshotter.prepares import IMAGE
from floe.snapshotter.snapshotter import Snapshotter
from floe.store.errors import UnavailableError
from floe.store.ids import hexdigest

CHAIN = "sha256:" + "a" * 64
NAME = "registry.example/app:1"


@pytest.fixture
def told(monkeypatch):
    """Every event of a snapshotter."""
    found = []
    made = Snapshotter.__init__
    monkeypatch.setattr(
        Snapshotter,
        "__init__",
        lambda self, config, layers: made(self, config, layers, lambda kind, **fields: found.append((kind, fields))),
    )
    return found


@pytest.fixture
def node(told, tmp_path):
    with nodes(tmp_path, prepare_timeout=0.5) as make:
        yield make()


def counts(node):
    return {name: sum(found["counts"]) for name, found in node.snapshotter.metrics().prepares.items()}


def test_a_lazy_layer_and_the_container_above_it(node, told):
    tree = hexdigest(b"tree")
    directory = node.base / "trees" / tree
    directory.mkdir(parents=True)
    node.layers.remote[tree], node.layers.chains[CHAIN] = directory, tree
    assert status(node.client.prepare, "k", "", {REF: CHAIN, IMAGE: NAME}) is Status.ALREADY_EXISTS
    (layer,) = node.client.list()
    node.client.prepare("k8s.io/9/box", layer.name)
    (_, lazy), (_, container) = told
    assert (lazy["outcome"], lazy["chain"], lazy["tree"], lazy["image"]) == ("lazy", CHAIN, tree, NAME)
    assert (container["outcome"], container["key"], container["trees"]) == ("container", "k8s.io/9/box", [tree])
    assert container["image"] == NAME
    assert container["at"] >= lazy["at"]
    assert node.layers.starts == [("k8s.io/9/box", NAME, [tree])]
    assert counts(node) == {"lazy": 1, "unpacked": 0, "container": 1, "refused": 0}


def test_a_layer_that_is_unpacked_says_why(node, told):
    node.layers.fail["resolve"] = UnavailableError("the store is gone")
    assert status(node.client.prepare, "k", "", {REF: CHAIN}) is Status.OK
    ((kind, event),) = told
    assert (kind, event["outcome"], event["reason"]) == ("prepare", "unpacked", "store_unavailable")
    assert event["detail"] == "the store is gone"
    assert node.layers.starts == []


def test_a_refusal_is_one_and_an_ordinary_container_starts_unseen(node, told):
    assert status(node.client.prepare, "k", "nobody") is Status.NOT_FOUND
    node.client.prepare("k", "")
    assert [event["outcome"] for _, event in told] == ["refused", "container"]
    assert "nobody" in told[0][1]["detail"]
    assert node.layers.starts == []
