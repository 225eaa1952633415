"""Lazy layers, against the snapshotter's own socket; trees are plain directories here."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.snapshots import REF, Status, mounted, nodes, status

from floe.store.errors import AccessDeniedError, DamagedError, DeadlineError, NotFoundError, UnavailableError
from floe.store.ids import hexdigest
from floe.store.spans import trace_hex
from floe.store.stub import ANNOTATION, MARKER, Marker

CHAIN = "sha256:" + "a" * 64
CHAIN_2 = "sha256:" + "b" * 64
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def make(tmp_path):
    with nodes(tmp_path, prepare_timeout=0.5) as make:
        yield make


def index(node, chain, text="lazy", *, remote=True):
    """Put a layer with one file into the store."""
    tree = hexdigest(f"{chain}{text}".encode())
    directory = node.base / "trees" / tree
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)
    (node.layers.remote if remote else node.layers.trees)[tree] = directory
    node.layers.chains[chain] = tree
    return tree


def prepare(node, key, chain, parent="", **labels):
    return status(node.client.prepare, key, parent, {REF: chain, **labels})


def find(node, chain, parent=""):
    """containerd's search after ALREADY_EXISTS."""
    return node.client.list(f'labels."{REF}"=={chain},parent=="{parent}"')


def fallbacks(node):
    return {reason: n for reason, n in node.snapshotter.metrics().fallbacks.items() if n}


def test_indexed_layer_is_committed_at_once_and_can_be_found(make):
    node = make()
    index(node, CHAIN)
    assert prepare(node, "k", CHAIN) is Status.ALREADY_EXISTS
    (found,) = find(node, CHAIN)
    assert (found.kind, found.parent, found.labels[REF]) == (3, "", CHAIN)
    assert node.client.stat(found.name) == found
    assert status(node.client.stat, "k") is Status.NOT_FOUND
    with mounted(node.client.prepare("c", found.name), node.base) as root:
        assert (root / "file").read_text() == "lazy"
        (root / "new").write_text("x")


def test_lazy_layers_stack_and_asking_again_finds_the_same(make):
    node = make()
    index(node, CHAIN, "one")
    index(node, CHAIN_2, "two")
    assert prepare(node, "k", CHAIN) is Status.ALREADY_EXISTS
    (one,) = find(node, CHAIN)
    assert prepare(node, "k", CHAIN_2, one.name) is Status.ALREADY_EXISTS
    (two,) = find(node, CHAIN_2, one.name)
    network = node.layers.network
    assert prepare(node, "k", CHAIN_2, one.name) is Status.ALREADY_EXISTS
    assert find(node, CHAIN_2, one.name) == [two]
    assert node.layers.network == network
    with mounted(node.client.view("v", two.name), node.base) as root:
        assert (root / "file").read_text() == "two"


def test_same_chain_above_another_parent_is_another_snapshot(make):
    node = make()
    index(node, CHAIN)
    node.layer("default/1/base")
    node.layer("k8s.io/2/base")
    for parent in ("default/1/base", "k8s.io/2/base"):
        assert prepare(node, "k", CHAIN, parent) is Status.ALREADY_EXISTS
    found = [info for parent in ("default/1/base", "k8s.io/2/base") for info in find(node, CHAIN, parent)]
    assert [info.parent for info in found] == ["default/1/base", "k8s.io/2/base"]
    assert len({info.name for info in found}) == 2


def test_without_ref_nothing_is_looked_up(make):
    node = make()
    index(node, CHAIN)
    node.client.prepare("a", "", {"containerd.io/snapshot/cri.layer-digest": CHAIN})
    node.client.view("v", "", {REF: CHAIN})
    assert node.layers.network == 0


def test_nothing_depends_on_cri_annotations(make):
    node = make()
    index(node, CHAIN)
    labels = {"containerd.io/snapshot/cri.image-ref": "nonsense", "containerd.io/snapshot/cri.layer-digest": "x"}
    assert prepare(node, "k", CHAIN, **labels) is Status.ALREADY_EXISTS


def test_layer_not_indexed_is_unpacked_and_counted(make, caplog):
    node = make()
    with caplog.at_level("INFO"):
        mounts = node.client.prepare("k", "", {REF: CHAIN})
    assert "ro" not in mounts[-1].options
    assert fallbacks(node) == {"not_indexed": 1}
    assert CHAIN in caplog.text
    assert "not_indexed" in caplog.text
    node.client.commit("c", "k", {REF: CHAIN})
    # Even indexed later: what is unpacked stays, another request becomes lazy.
    index(node, CHAIN)
    assert prepare(node, "k", CHAIN) is Status.ALREADY_EXISTS


def test_lines_of_the_log_name_layer_image_and_the_trace_that_containerd_named(make, caplog):
    node = make()
    index(node, CHAIN)
    image = {"containerd.io/snapshot/cri.image-ref": "registry.example/app:1"}
    with caplog.at_level("INFO"):
        node.client.metadata = (*node.client.metadata, ("traceparent", TRACEPARENT))
        assert prepare(node, "lazy", CHAIN, **image) is Status.ALREADY_EXISTS
        node.client.prepare("unpacked", "", {REF: CHAIN_2, **image})
        (below,) = find(node, CHAIN)
        node.client.metadata = node.client.metadata[:-1]
        node.client.prepare("container", below.name)
    lazy, unpacked, container = (
        next(record for record in caplog.records if words in record.getMessage())
        for words in ("served lazily", "the ordinary way", "container container is about to start")
    )
    trace = TRACEPARENT.split("-")[1]
    assert (lazy.layer, lazy.image, lazy.trace) == (CHAIN, "registry.example/app:1", trace)
    assert (unpacked.layer, unpacked.image, unpacked.trace) == (CHAIN_2, "registry.example/app:1", trace)
    # Of one that named none it is the trace in which its spans would be.
    assert (container.image, container.trace) == ("registry.example/app:1", trace_hex("container"))
    assert trace_hex("container") != trace


def test_concurrent_requests_for_one_layer_mount_it_once(make):
    node = make()
    index(node, CHAIN)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: prepare(node, f"k{n}", CHAIN), range(8)))
    assert set(answers) == {Status.ALREADY_EXISTS}
    assert len(find(node, CHAIN)) == 1
    assert node.layers.network == 2


@pytest.mark.parametrize(
    ("stage", "error", "reason"),
    [
        ("resolve", UnavailableError("down"), "store_unavailable"),
        ("resolve", AccessDeniedError("no"), "store_unavailable"),
        ("resolve", DeadlineError("slow"), "timeout"),
        ("resolve", DamagedError("bad manifest"), "damaged"),
        ("fetch", NotFoundError("no tree"), "damaged"),
        ("fetch", DamagedError("bad tree"), "damaged"),
        ("mount", UnavailableError("no packfs"), "packfs"),
        ("mount", DeadlineError("slow"), "timeout"),
        ("mount", DamagedError("bad tree"), "damaged"),
    ],
)
def test_failing_store_falls_back_or_refuses(make, stage, error, reason):
    for on_store_error in ("unpack", "error"):
        node = make(on_store_error=on_store_error)
        index(node, CHAIN)
        node.layers.fail[stage] = error
        if on_store_error == "unpack":
            assert prepare(node, "k", CHAIN) is Status.OK
        else:
            assert prepare(node, "k", CHAIN) is Status.UNAVAILABLE
            assert node.client.names() == set()
        assert fallbacks(node) == ({reason: 1} if on_store_error == "unpack" else {})


def test_half_made_lazy_mount_is_an_error_and_never_an_upperdir(make):
    node = make()
    index(node, CHAIN)
    node.layers.fail["bind"] = UnavailableError("bind failed")
    assert prepare(node, "k", CHAIN) is Status.UNAVAILABLE
    assert node.client.names() == set()
    half = {path.name for path in (node.config.root / "s").iterdir()}
    upper = node.upper(node.client.prepare("k", ""))
    assert upper.parent.name not in half
    node.client.cleanup()
    assert {path.name for path in (node.config.root / "s").iterdir()} == {upper.parent.name}
    assert not any(node.layers.owners.values())


def test_stalled_lookups_end_at_the_deadline_and_block_nobody_else(make):
    node = make(prepare_timeout=1.5)
    node.layers.gate = threading.Event()
    started = time.monotonic()
    with ThreadPoolExecutor(40) as pool:
        chains = ["sha256:" + f"{n:064x}" for n in range(40)]
        answers = [pool.submit(prepare, node, f"k{n}", chain) for n, chain in enumerate(chains)]
        for number in range(20):
            node.client.prepare(f"ordinary {number}", "")
        assert time.monotonic() - started < 20 * 1.5 / 2  # each would wait for that long, behind those that stall
        assert {answer.result() for answer in answers} == {Status.OK}
    assert time.monotonic() - started < 40 * 1.5 / 2  # one after the other
    assert set(fallbacks(node)) <= {"timeout", "breaker_open"}


def test_one_pull_waits_for_a_silent_store_once(make):
    node = make()
    node.layers.gate = threading.Event()
    parent = ""
    for number in range(6):
        chain = "sha256:" + f"{number:064x}"
        node.client.prepare(f"extract {chain}", parent, {REF: chain})
        node.client.commit(chain, f"extract {chain}", {REF: chain})
        parent = chain
    assert node.layers.network == 1
    assert fallbacks(node)["timeout"] >= 1


def test_open_breaker_lets_a_probe_through_and_closes_again(make):
    node = make()
    index(node, CHAIN)
    node.layers.fail["resolve"] = UnavailableError("down")
    assert prepare(node, "k0", CHAIN) is Status.OK
    asked = node.layers.network
    assert prepare(node, "k1", CHAIN) is Status.OK
    assert node.layers.network == asked
    assert fallbacks(node) == {"store_unavailable": 1, "breaker_open": 1}
    assert node.snapshotter.metrics().breaker == "open"
    del node.layers.fail["resolve"]
    node.snapshotter.resolver.breaker._cool_down = 0
    assert prepare(node, "k2", CHAIN) is Status.ALREADY_EXISTS
    assert node.snapshotter.metrics().breaker == "closed"


def test_labelled_stub_mounts_its_tree_or_is_unavailable(make):
    node = make()
    tree = index(node, "model", "weights")
    node.layers.fail["fetch"] = UnavailableError("down")
    labels = {ANNOTATION: tree}
    for _ in range(2):
        assert prepare(node, "k", CHAIN, **labels) is Status.UNAVAILABLE
        assert status(node.client.prepare, "k", "", labels) is Status.UNAVAILABLE
    assert node.client.names() == set()
    # A later pull succeeds at once: needed trees do not wait for the breaker's cool-down.
    del node.layers.fail["fetch"]
    assert prepare(node, "k", CHAIN, **labels) is Status.ALREADY_EXISTS
    (found,) = find(node, CHAIN)
    with mounted(node.client.view("v", found.name), node.base) as root:
        assert (root / "file").read_text() == "weights"


def test_labelled_stub_is_unavailable_when_its_tree_cannot_be_mounted(make):
    node = make()
    tree = index(node, "model", "weights")
    node.layers.fail["mount"] = UnavailableError("no packfs")
    assert prepare(node, "k", CHAIN, **{ANNOTATION: tree}) is Status.UNAVAILABLE


def test_malformed_model_label_is_refused(make):
    node = make()
    assert status(node.client.prepare, "k", "", {ANNOTATION: "latest"}) is Status.INVALID_ARGUMENT


def unpack_stub(node, name, tree, *, more=None, parent=""):
    marker = Marker(tree, "/models/m", "m:latest", "c" * 64).encode().decode()
    content = {MARKER: marker, "models/m/README": "Floe is missing here", **(more or {})}
    return node.layer(name, parent, content)


def test_stub_without_label_is_recognised_by_its_marker(make):
    node = make()
    tree = index(node, "model", "weights")
    node.layer("base", files={"etc/base": "b"})
    unpack_stub(node, "stub", tree, parent="base")
    assert node.layers.network == 0
    with mounted(node.client.prepare("c", "stub"), node.base) as root:
        assert (root / "file").read_text() == "weights"
        assert (root / "etc/base").read_text() == "b"
        assert not (root / "models").exists()
    with mounted(node.client.prepare("child", "stub"), node.base):
        pass
    node.client.commit("above", "child")
    with mounted(node.client.view("v", "above"), node.base) as root:
        assert (root / "file").read_text() == "weights"


@pytest.mark.parametrize(
    "more", [{"etc/app.conf": "mine"}, {"models/m/notes": "mine"}], ids=lambda more: next(iter(more))
)
def test_marker_in_a_layer_with_any_file_of_its_own_keeps_that_file(make, more):
    """As where a builder squashed a few files of an application and the stub into one layer."""
    node = make()
    tree = index(node, "model", "weights")
    unpack_stub(node, "squashed", tree, more=more)
    with mounted(node.client.prepare("c", "squashed"), node.base) as root:
        assert (root / "file").read_text() == "weights"
        assert (root / next(iter(more))).read_text() == "mine"


def test_above_a_stub_that_cannot_be_mounted_everything_is_unavailable(make):
    node = make()
    tree = index(node, "model", "weights")
    unpack_stub(node, "stub", tree)
    node.layers.fail["fetch"] = UnavailableError("down")
    for call in (node.client.prepare, node.client.view):
        assert status(call, "c", "stub") is Status.UNAVAILABLE
    assert node.client.names() == {"stub"}
    del node.layers.fail["fetch"]
    with mounted(node.client.view("c", "stub"), node.base) as root:
        assert (root / "file").read_text() == "weights"


def test_marker_in_a_larger_layer_puts_the_model_above_it(make):
    node = make()
    tree = index(node, "model", "weights")
    unpack_stub(node, "squashed", tree, more={f"lib/{n}": "x" for n in range(100)})
    with mounted(node.client.prepare("c", "squashed"), node.base) as root:
        assert (root / "file").read_text() == "weights"
        assert len(list((root / "lib").iterdir())) == 100


@pytest.mark.parametrize("how", ["garbage", "link", "directory link", "fifo", "huge"])
def test_marker_that_is_none_makes_an_ordinary_layer(make, how):
    node = make()
    upper = node.upper(node.client.prepare("k", ""))
    marker = upper / MARKER
    outside = node.base / "outside"
    (outside / "x").mkdir(parents=True)
    (outside / "model.json").write_bytes(Marker("a" * 64, "/m", "m", "c" * 64).encode())
    if how == "directory link":
        marker.parent.symlink_to(outside)
    else:
        marker.parent.mkdir()
    if how == "garbage":
        marker.write_text("{}")
    elif how == "link":
        marker.symlink_to(outside / "model.json")
    elif how == "fifo":
        os.mkfifo(marker)
    elif how == "huge":
        marker.write_bytes(Marker("a" * 64, "/m", "m", "c" * 64).encode() + b" " * (1 << 20))
    node.client.commit("c", "k")
    node.client.prepare("above", "c")


def test_removed_lazy_snapshot_is_released_by_cleanup_only(make):
    node = make()
    tree = index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    node.client.remove(found.name)
    assert node.layers.owners[tree]
    assert find(node, CHAIN) == []
    node.layers.busy()
    node.client.cleanup()
    assert node.layers.owners[tree]
    assert node.snapshotter.metrics().counters["cleanup_busy"] == 1
    del node.layers.fail["release"]
    node.client.cleanup()
    assert not node.layers.owners[tree]
    assert list((node.config.root / "s").iterdir()) == []
    assert prepare(node, "k", CHAIN) is Status.ALREADY_EXISTS


def test_lazy_parent_with_children_cannot_be_removed(make):
    node = make()
    index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    node.client.prepare("c", found.name)
    assert status(node.client.remove, found.name) is Status.FAILED_PRECONDITION


def test_restart_keeps_lazy_snapshots_and_asks_nobody(make):
    node = make()
    index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    active = node.client.prepare("c", found.name)
    asked = node.layers.network
    node.layers.gate = threading.Event()
    node.restart()
    assert find(node, CHAIN) == [found]
    assert node.client.mounts("c") == active
    # As after a reboot: nothing is mounted any more.
    node.stop()
    node.layers.unbind(Path(active[0].options[2].removeprefix("lowerdir=")))
    node.start()
    assert node.failed == []
    with mounted(node.client.mounts("c"), node.base) as root:
        assert (root / "file").read_text() == "lazy"
    assert node.layers.network == asked


def test_tree_that_cannot_be_remounted_is_counted_and_tried_at_next_use(make):
    node = make()
    tree = index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    node.stop()
    node.layers.unbind(node.config.root / "s" / "1" / "fs")
    del node.layers.trees[tree]
    node.layers.fail["fetch"] = UnavailableError("down")
    node.start()
    assert [snapshot.name for snapshot in node.failed] == [found.name]
    assert (node.snapshotter.metrics().remount_failures, node.snapshotter.metrics().unmounted) == (1, 1)
    node.client.prepare("ordinary", "")
    assert status(node.client.prepare, "c", found.name) is Status.UNAVAILABLE
    assert node.snapshotter.metrics().unmounted == 1
    del node.layers.fail["fetch"]
    assert node.snapshotter.remount(node.failed) == []
    assert (node.snapshotter.metrics().remount_failures, node.snapshotter.metrics().unmounted) == (1, 0)
    node.client.prepare("c", found.name)


def test_dead_tree_is_mounted_anew_at_next_use(make):
    node = make()
    tree = index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    node.snapshotter.lazy._present.clear()
    node.layers.sick.add(tree)
    bound = len(node.layers.bound)
    node.client.prepare("c", found.name)
    assert len(node.layers.bound) == bound + 1


def test_crash_while_mounting_leaves_nothing_behind(make):
    node = make()
    tree = index(node, CHAIN)
    node.layers.trees[tree] = node.layers.remote[tree]
    made = node.snapshotter._meta.begin_lazy("floe/x/", 0, {REF: CHAIN}, CHAIN, tree)
    node.snapshotter.lazy.attach(made)
    node.restart()
    assert node.client.names() == set()
    assert list((node.config.root / "s").iterdir()) == []
    assert not node.layers.owners[tree]


def test_stop_unmounts_and_deletes_nothing(make):
    node = make()
    index(node, CHAIN)
    prepare(node, "k", CHAIN)
    upper = node.upper(node.client.prepare("a", ""))
    before = len(node.layers.bound)
    node.stop()
    assert upper.exists()
    assert (node.config.root / "s" / "1" / "fs" / "file").exists()
    assert len(node.layers.bound) == before
    node.start()


def test_usage_of_a_lazy_layer_is_what_the_node_holds(make):
    node = make()
    index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    usage = node.client.usage(found.name)
    assert (usage.size, usage.inodes) == (4096, 1)


def test_shared_and_cached_trees_are_never_listed(make):
    node = make()
    index(node, CHAIN, remote=False)
    assert node.client.names() == set()


def test_update_cannot_take_the_ref_away(make):
    node = make()
    index(node, CHAIN)
    prepare(node, "k", CHAIN)
    (found,) = find(node, CHAIN)
    for labels, paths in (({"k": "v"}, ()), ({"k": "v", REF: "other"}, ("labels",)), ({}, (f"labels.{REF}",))):
        updated = node.client.update(found.name, labels, *paths)
        assert updated.labels[REF] == CHAIN
        assert updated.labels["k"] == "v"
        assert prepare(node, "k", CHAIN) is Status.ALREADY_EXISTS
        assert [info.name for info in find(node, CHAIN)] == [found.name]


def test_packs_that_layers_share_are_counted_once(make):
    node = make()
    first, second = index(node, CHAIN, "one"), index(node, CHAIN_2, "two")
    node.layers.pack_ids |= {first: frozenset("ab"), second: frozenset("bc")}
    node.layer("base")
    names = []
    for chain, parent in ((CHAIN, ""), (CHAIN_2, ""), (CHAIN, "base")):
        prepare(node, "k", chain, parent)
        (found,) = find(node, chain, parent)
        names.append(found.name)
    assert [node.client.usage(name).inodes for name in names] == [3, 2, 0]
    assert sum(node.client.usage(name).size for name in names) == 5 * 4096
    # When the oldest goes, the next has it all.
    node.client.remove(names[0])
    node.snapshotter._measures._usage.clear()
    assert [node.client.usage(name).inodes for name in names[1:]] == [3, 2]


def test_trees_given_up_at_start_are_logged_and_counted(make, monkeypatch, caplog):
    node = make()
    for chain in (CHAIN, CHAIN_2):
        index(node, chain)
        prepare(node, "k", chain)
    node.stop()
    monkeypatch.setattr("floe.snapshotter.lazymounts.START_TIME", -1)
    with caplog.at_level("WARNING"):
        node.start()
    assert len(node.failed) == 2
    assert (node.snapshotter.metrics().remount_failures, node.snapshotter.metrics().unmounted) == (2, 2)
    assert "2 snapshots" in caplog.text
    assert node.snapshotter.remount(node.failed) == []
    assert node.snapshotter.metrics().unmounted == 0
