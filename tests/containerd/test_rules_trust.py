"""A snapshotter with trusted keys, and layers and models that nobody vouches for; trees are plain directories here."""

import pytest
from support.mounts import until
from support.snapshots import REF, Status, mounted, nodes, status

from floe.store.errors import UnavailableError, UntrustedError
from floe.store.ids import hexdigest
from floe.store.stub import ANNOTATION, MARKER, MODELS_AHEAD, Marker, models_ahead

CHAIN = "sha256:" + "a" * 64


@pytest.fixture
def make(tmp_path):
    with nodes(tmp_path, prepare_timeout=5, prefetch_at_prepare=77) as start:

        def make(**settings):
            node = start(**settings)
            node.layers.signed = set()
            return node

        yield make


def tree_of(node, text, *, signed=False, remote=True):
    tree = hexdigest(text.encode())
    directory = node.base / "trees" / tree
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)
    (node.layers.remote if remote else node.layers.trees)[tree] = directory
    if signed:
        node.layers.signed.add(tree)
    return tree


def prepare(node, key, labels, parent=""):
    return status(node.client.prepare, key, parent, labels)


def fallbacks(node):
    return {reason: n for reason, n in node.snapshotter.metrics().fallbacks.items() if n}


@pytest.mark.parametrize("on_store_error", ["unpack", "error"])
def test_a_layer_that_is_not_signed_is_unpacked_and_counted(make, on_store_error):
    node = make(on_store_error=on_store_error)
    node.layers.fail["resolve"] = UntrustedError("layer x is not signed")
    assert prepare(node, "k", {REF: CHAIN}) is Status.OK
    assert fallbacks(node) == {"untrusted": 1}
    # The store answered: it is asked again at once.
    assert node.snapshotter.metrics().breaker == "closed"
    del node.layers.fail["resolve"]
    node.layers.chains[CHAIN] = tree_of(node, "signed")
    assert prepare(node, "k2", {REF: CHAIN}) is Status.ALREADY_EXISTS


@pytest.mark.parametrize("remote", [True, False], ids=["in the store", "in the node cache"])
@pytest.mark.parametrize("labels", [{}, {REF: CHAIN}], ids=["unpacked", "lazy"])
def test_a_model_that_is_not_signed_fails_its_pull(make, labels, remote):
    node = make()
    tree = tree_of(node, "evil", remote=remote)
    assert prepare(node, "k", {ANNOTATION: tree, **labels}) is Status.PERMISSION_DENIED
    assert node.client.names() == set()
    assert node.snapshotter.metrics().counters["refused"] == 1
    assert not node.layers.owners.get(tree)
    assert (tree in node.layers.trees) is not remote  # nothing of it was fetched
    node.layers.signed.add(tree)
    assert prepare(node, "k", {ANNOTATION: tree, **labels}) in (Status.OK, Status.ALREADY_EXISTS)


def test_signatures_that_cannot_be_asked_for_are_none(make):
    node = make()
    tree = tree_of(node, "model", signed=True, remote=False)
    node.layers.fail["vouch"] = UnavailableError("down")
    assert prepare(node, "k", {ANNOTATION: tree}) is Status.UNAVAILABLE
    del node.layers.fail["vouch"]
    assert prepare(node, "k", {ANNOTATION: tree}) is Status.OK
    # A tree is what its digest says: it is asked for once.
    asked = node.layers.network
    assert prepare(node, "k2", {ANNOTATION: tree}) is Status.OK
    assert node.layers.network == asked


@pytest.mark.parametrize("signed", [False, True])
def test_a_marker_s_model_is_asked_for_before_the_layer_is_committed(make, signed):
    node = make()
    tree = tree_of(node, "model", signed=signed)
    with mounted(node.client.prepare("extract"), node.base) as root:
        (root / MARKER).parent.mkdir()
        (root / MARKER).write_bytes(Marker(tree, "/m", "m:1", "c" * 64).encode())
    assert status(node.client.commit, "stub", "extract") is (Status.OK if signed else Status.PERMISSION_DENIED)
    assert node.client.names() == {"stub" if signed else "extract"}
    if signed:
        with mounted(node.client.prepare("c", "stub"), node.base) as root:
            assert (root / "file").read_text() == "model"


def test_a_model_that_was_prepared_before_keys_were_trusted_is_asked_for_at_its_commit(make):
    node = make()
    tree = tree_of(node, "model")
    node.layers.signed = None
    assert prepare(node, "k", {ANNOTATION: tree}) is Status.OK
    node.layers.signed = set()
    node.restart()
    assert status(node.client.commit, "stub", "k") is Status.PERMISSION_DENIED


def test_an_ordinary_layer_asks_nobody(make):
    node = make()
    node.layer("plain", files={"etc/motd": "x"})
    assert node.layers.network == 0


def test_models_ahead_are_fetched_only_when_signed(make):
    node = make()
    good, evil = tree_of(node, "good", signed=True), tree_of(node, "evil")
    assert prepare(node, "k", {MODELS_AHEAD: models_ahead([evil, good])}) is Status.OK
    until(lambda: node.layers.expected == [(good, 77)])
    assert evil not in node.layers.trees


def test_what_was_there_before_keys_were_trusted_stays(make):
    """Containers of it run, and nobody can tell who made it: an operator who wants it gone removes the image."""
    node = make()
    node.layers.signed = None
    model = tree_of(node, "model")
    layer = node.layers.chains[CHAIN] = tree_of(node, "layer")
    assert prepare(node, "k", {REF: CHAIN}) is Status.ALREADY_EXISTS
    (lower,) = node.client.names()
    assert prepare(node, "k2", {ANNOTATION: model}, lower) is Status.OK
    node.client.commit("stub", "k2")
    node.layers.signed = set()
    node.restart()
    assert node.failed == []
    assert node.snapshotter.metrics().trusted_keys == ("key",)
    with mounted(node.client.prepare("c", "stub"), node.base) as root:
        assert (root / "file").read_text() == "model"
    assert node.layers.owners[layer]
