"""Which models a Prepare sets on their way, and until when; trees are plain directories here."""

import threading

import pytest
from support.mounts import until
from support.snapshots import REF, Status, nodes, status

from floe.store.errors import UnavailableError
from floe.store.stub import ANNOTATION, MODELS_AHEAD, models_ahead

CHAIN = "sha256:" + "a" * 64
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def make(tmp_path):
    def with_trees(**settings):
        node = start(**settings)
        for tree in (ONE, TWO):
            directory = node.base / "trees" / tree
            directory.mkdir(parents=True)
            node.layers.remote[tree] = directory
        return node

    with nodes(tmp_path, prepare_timeout=5, prefetch_at_prepare=77) as start:
        yield with_trees


def prepare(node, key, labels, parent=""):
    return status(node.client.prepare, key, parent, labels)


def expected(node):
    return sorted(tree for tree, nbytes in node.layers.expected if nbytes == 77)


def test_the_first_layer_of_an_image_sets_its_models_on_their_way_once(make):
    node = make()
    labels = {MODELS_AHEAD: models_ahead([ONE, TWO])}
    assert prepare(node, "k", labels) is Status.OK
    until(lambda: expected(node) == [ONE, TWO])
    node.client.commit("layer", "k", labels)
    assert prepare(node, "k2", labels, "layer") is Status.OK
    assert prepare(node, "k3", {ANNOTATION: ONE}, "layer") is Status.OK
    assert expected(node) == [ONE, TWO]
    assert node.snapshotter.metrics().counters["models_ahead"] == 2


def test_a_model_s_own_layer_does_so_too(make):
    node = make()
    assert prepare(node, "k", {ANNOTATION: ONE}) is Status.OK
    until(lambda: expected(node) == [ONE])
    assert prepare(node, "k2", {ANNOTATION: TWO, REF: CHAIN}) is Status.ALREADY_EXISTS
    until(lambda: expected(node) == [ONE, TWO])


def test_a_prepare_does_not_wait_for_it_nor_fail_with_it(make):
    node = make()
    node.layers.gate = threading.Event()
    assert prepare(node, "k", {MODELS_AHEAD: ONE}) is Status.OK
    until(lambda: node.layers.network == 1)
    assert not node.layers.expected
    node.layers.fail["fetch"] = UnavailableError("no store")
    node.layers.gate.set()
    until(lambda: not node.snapshotter._ahead._begun)
    assert (node.snapshotter.resolver.breaker.state, node.layers.expected) == ("closed", [])
    # The next one that names it tries again; whatever is wrong, containerd is not told.
    del node.layers.fail["fetch"]
    node.layers.fail["expect"] = ValueError("nobody thought of this")
    assert prepare(node, "k2", {MODELS_AHEAD: ONE}) is Status.OK
    until(lambda: expected(node) == [ONE])
    until(lambda: not node.snapshotter._ahead._begun)


def test_what_no_snapshot_names_any_more_is_fetched_no_further(make):
    node = make()
    for key in ("a", "b"):
        assert prepare(node, key, {MODELS_AHEAD: ONE}) is Status.OK
    until(lambda: expected(node) == [ONE])
    node.client.remove("a")
    assert node.layers.unexpected == []
    node.client.remove("b")
    assert node.layers.unexpected == [ONE]
    # Another pull begins anew.
    assert prepare(node, "c", {MODELS_AHEAD: ONE}) is Status.OK
    until(lambda: expected(node) == [ONE, ONE])


def test_a_snapshot_that_is_removed_before_its_tree_has_come(make):
    node = make()
    node.layers.gate = threading.Event()
    assert prepare(node, "k", {MODELS_AHEAD: ONE}) is Status.OK
    until(lambda: node.layers.network == 1)
    node.client.remove("k")
    node.layers.gate.set()
    until(lambda: ONE in node.layers.trees)
    assert prepare(node, "k", {MODELS_AHEAD: TWO}) is Status.OK
    until(lambda: expected(node) == [TWO])


def test_a_prepare_that_fails_takes_it_back(make):
    node = make()
    node.layers.fail["mount"] = UnavailableError("no packfs")
    assert prepare(node, "k", {ANNOTATION: ONE, REF: CHAIN}) is Status.UNAVAILABLE
    until(lambda: node.layers.unexpected == [ONE])
    assert not node.snapshotter._ahead._begun


def test_labels_that_name_no_tree_are_passed_over(make):
    node = make()
    assert prepare(node, "k", {MODELS_AHEAD: "nonsense,,../x," + ONE}) is Status.OK
    until(lambda: expected(node) == [ONE])


def test_none_of_it_with_zero_bytes(make):
    node = make(prefetch_at_prepare=0)
    assert prepare(node, "k", {MODELS_AHEAD: ONE}) is Status.OK
    assert prepare(node, "k2", {ANNOTATION: TWO}) is Status.OK
    assert (node.layers.expected, ONE in node.layers.trees) == ([], False)
