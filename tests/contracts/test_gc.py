"""Garbage collection over every kind of store: what goes, what stays, and when nothing is touched."""

from __future__ import annotations

import json

import pytest
from support.images import add, build_oci
from support.somestore import catalog, everything, google, make_model, push, url
from support.trees import read_packs, read_tree

from floe.cli.main import main
from floe.ingest.oci.attach import attach
from floe.ingest.oci.image import index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.damage import report
from floe.store.errors import AccessDeniedError, DamagedError, UnsupportedError
from floe.store.hotlayout import HotLayouts
from floe.store.ids import ModelRef, hexdigest
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.profile import Profile
from floe.store.profiles import ProfileStore, layer_source, model_source
from floe.upkeep.gc import GRACE, Collector

__all__ = ["catalog", "google", "url"]


def collector(catalog, grace=0.0, uploads=None, **options):
    return Collector(catalog, uploads, grace=grace, **options)


def keys(catalog, *prefixes):
    return {info.key for prefix in prefixes for info in catalog.store.list(prefix)}


def content(catalog):
    return keys(catalog, "packs", "indexes", "chunks", "trees", "manifests", "profiles", "refs")


def read(catalog, name):
    _, manifest = catalog.resolve_model(ModelRef.parse(name))
    return read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)


def test_what_is_named_stays_and_the_rest_goes(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000, 70_000), "a")
    needed = content(catalog)
    push(catalog, make_model(tmp_path, "b", 5000, 90_000), "org/b:v1")
    garbage = content(catalog) - needed
    catalog.remove_model(ModelRef.parse("org/b:v1"))
    before = everything(catalog.store)
    looked = collector(catalog).look()
    assert everything(catalog.store) == before
    done = collector(catalog).remove()
    assert content(catalog) == needed
    assert keys(catalog, "gc") == {layout.MARKS_KEY}
    assert done.removed == done.due == done.unneeded == looked.due
    assert {kind: tally.count for kind, tally in done.removed.items()} == {
        "manifests": 1,
        "trees": 1,
        "profiles": 1,
        "packs": 1,
    }
    removed = garbage - {layout.model_ref_key(ModelRef.parse("org/b:v1"))}
    assert sum(tally.size for tally in done.removed.values()) == sum(len(before[key]) for key in removed)
    read(catalog, "a")
    assert collector(catalog).remove().unneeded == {}


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_tree_s_signatures_go_with_it(catalog, tmp_path):
    trees = [push(catalog, make_model(tmp_path, n, s), n).manifest.tree.digest for n, s in (("a", 5000), ("b", 6000))]
    for tree in (*trees, "ab" * 32):
        catalog.store.put(layout.tree_signatures_key(tree), b"{}")
    catalog.remove_model(ModelRef("b"))
    assert collector(catalog).remove().removed["trees"].count == 2  # of one only the signatures were left
    assert keys(catalog, "signatures") == {layout.tree_signatures_key(trees[0])}


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_pack_s_damage_record_goes_with_it(catalog, tmp_path):
    packs = [push(catalog, make_model(tmp_path, n, s), n).manifest.packs[0].id for n, s in (("a", 5000), ("b", 6000))]
    for pack in packs:
        report(catalog.store, pack, [0], [], "node")
    catalog.remove_model(ModelRef("b"))
    assert collector(catalog).remove().removed["packs"].count == 1
    assert keys(catalog, layout.DAMAGE) == {layout.damage_key(packs[0])}


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_tag_that_moved_leaves_what_it_named(catalog, tmp_path):
    old = push(catalog, make_model(tmp_path, "a", 5000), "a")
    push(catalog, make_model(tmp_path, "a", 6000), "a")
    collector(catalog).remove()
    read(catalog, "a")
    with pytest.raises(Exception, match=old.digest):
        catalog.get_manifest(old.digest)


def layer(name, size):
    return lambda tar: add(tar, name, name.encode() * size)


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_layers_go_with_the_last_image_that_has_them(catalog, tmp_path):
    shared = layer("shared", 3000)
    images = [build_oci(tmp_path / n, [shared, layer(n, 2000)], tag=n) for n in ("one", "two")]
    spool = tmp_path / "spool"
    one, two = (index_image(catalog, image.source, spool_dir=spool, workers=1) for image in images)
    catalog.remove_image(one.record.manifest_digest)
    done = collector(catalog).remove()
    assert (done.removed["layers"].count, done.removed["chain records"].count) == (1, 1)
    assert catalog.resolve_chain(one.layers[1].chain_id) is None
    for kept in two.layers:
        read_packs(catalog, catalog.resolve_chain(kept.chain_id)[2])
    catalog.remove_image(two.record.manifest_digest)
    collector(catalog).remove()
    assert content(catalog) == set()
    # And it can be indexed again.
    index_image(catalog, images[0].source, spool_dir=spool, workers=1)
    assert catalog.resolve_chain(one.layers[1].chain_id) is not None


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_an_attached_image_keeps_its_models(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    image = build_oci(tmp_path / "oci", [layer("base", 10)])
    result = attach(catalog, image.source, f"oci:{tmp_path}/target:t", [(ModelRef("a"), "/models/a")])
    catalog.remove_model(ModelRef("a"))
    assert collector(catalog).remove().unneeded == {}
    (model,) = catalog.attachment(result.manifest_digest).models
    read_tree(catalog, model["tree"])
    read_packs(catalog, catalog.get_manifest(model["manifest"]))
    catalog.remove_image(result.manifest_digest)
    collector(catalog).remove()
    assert content(catalog) == set()


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_profiles_and_layouts_go_with_the_last_of_their_name(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000), "a:one")
    second = push(catalog, make_model(tmp_path, "a", 6000), "a:two")
    store = catalog.store
    for source in (model_source("a"), model_source("gone"), layer_source("x/y:1", "linux/amd64", 0)):
        store.put(layout.source_profile_key(source), Profile(source=source).encode())
        HotLayouts(catalog).put(source, ["0" * 64])
    catalog.remove_model(ModelRef.parse("a:one"))
    collector(catalog).remove()
    assert keys(catalog, "profiles") == {
        layout.tree_profile_key(second.manifest.tree.digest),
        layout.source_profile_key(model_source("a")),
        layout.source_layout_key(model_source("a")),
    }
    assert ProfileStore(catalog).of_tree(second.manifest.tree.digest).source == model_source("a")


def test_the_grace_period_begins_when_a_collector_first_sees_it(catalog, tmp_path, monkeypatch):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    catalog.remove_model(ModelRef("a"))
    before = content(catalog)
    first = collector(catalog, GRACE).remove()
    assert (first.due, first.removed) == ({}, {})
    assert GRACE - 60 < first.next_due <= GRACE
    assert content(catalog) == before
    marks = json.loads(bytes(catalog.store.get(layout.MARKS_KEY)))
    (seen,) = marks["seen"]
    # Seen longer ago, but written lately: a push that died stored it again.
    marks["seen"] = {str(int(seen) - 7200): marks["seen"][seen]}
    catalog.store.put(layout.MARKS_KEY, json.dumps(marks).encode())
    assert collector(catalog, 3600.0).remove().removed == {}
    # Written long ago, and seen long ago.
    later = 7200.0
    take = collector(catalog)._turn.__class__.take
    monkeypatch.setattr("floe.upkeep.turn.Turn.take", lambda turn: take(turn) + later)
    assert collector(catalog, 3600.0).remove().removed["packs"].count == 1
    assert content(catalog) == set()


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_named_again_in_between_it_stays(catalog, tmp_path):
    home = make_model(tmp_path, "a", 5000)
    push(catalog, home, "a")
    catalog.remove_model(ModelRef("a"))
    collector(catalog, GRACE).remove()
    push(catalog, home, "a")
    assert "packs" not in collector(catalog).remove().removed
    read(catalog, "a")


@pytest.mark.parametrize("url", ["memory"], indirect=True)
@pytest.mark.parametrize("what", ["manifest", "ref"])
def test_nothing_goes_while_something_named_cannot_be_followed(catalog, tmp_path, what):
    pushed = push(catalog, make_model(tmp_path, "a", 5000), "a")
    push(catalog, make_model(tmp_path, "b", 6000), "b")
    catalog.remove_model(ModelRef("b"))
    key = layout.manifest_key(pushed.digest) if what == "manifest" else layout.model_ref_key(ModelRef("a"))
    catalog.store.put(key, b"{}")
    before = content(catalog)
    for act in (collector(catalog).look, collector(catalog).remove):
        with pytest.raises(DamagedError, match="nobody knows what these need") as caught:
            act()
        assert key in str(caught.value)
        assert "floe fsck" in caught.value.hint
    assert content(catalog) == before
    assert keys(catalog, "gc") == set()


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_what_floe_does_not_write_stays(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    foreign = {
        "packs/README",
        "trees/aa/mine",
        f"packs/ab/{'c' * 64}",
        "profiles/x",
        "notes/today",
    }
    for key in foreign:
        catalog.store.put(key, b"?")
    assert collector(catalog).remove().unneeded == {}
    assert foreign <= keys(catalog, "")


def test_what_checks_and_benches_left(catalog, tmp_path, monkeypatch):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    for key in ("checks/1", "bench/2/x"):
        catalog.store.put(key, b"left")
    assert collector(catalog).remove().leftovers.count == 0  # they may be in use
    monkeypatch.setattr("floe.upkeep.gc._LEAST_LEFTOVER", 0.0)
    done = collector(catalog).remove()
    assert (done.leftovers.count, done.leftovers.size) == (2, 8)
    assert keys(catalog, "checks", "bench") == set()


@pytest.mark.parametrize("url", ["s3", "gs"], indirect=True)
def test_unfinished_uploads(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    uploads = catalog.store.inner.multipart.uploads
    key = layout.pack_key(hexdigest(b"some pack"))
    upload = uploads.create(key)
    assert collector(catalog, GRACE, uploads).remove().uploads == 0
    assert [found.id for found in uploads.find(key)] == [upload]
    assert collector(catalog, 0.0, uploads).remove().uploads == 1
    assert uploads.find(key) == []


@pytest.mark.parametrize("url", ["gs"], indirect=True)
def test_without_the_permission_nothing_changes(catalog, google, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    catalog.remove_model(ModelRef("a"))
    before = everything(catalog.store)
    google.denied = {"storage.objects.delete"}
    with pytest.raises(AccessDeniedError, match="nothing was removed") as caught:
        collector(catalog).remove()
    google.denied = set()
    assert "storage.objects.delete" in caught.value.hint
    assert everything(catalog.store) == before


@pytest.mark.parametrize("url", ["memory"], indirect=True)
def test_a_server_that_ignores_conditions_is_refused(catalog, tmp_path, monkeypatch):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    catalog.remove_model(ModelRef("a"))
    before = content(catalog)
    inner = catalog.store.inner
    monkeypatch.setattr(inner, "put_if", lambda key, data, _version: inner.put(key, data) or inner.head(key).version)
    with pytest.raises(UnsupportedError, match="ignores conditional puts"):
        collector(catalog).remove()
    assert content(catalog) == before
    assert keys(catalog, "gc") == set()


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_the_index_forgets_first(catalog, url, tmp_path):
    indexed = Catalog(open_store(url), open_index(f"sqlite:{tmp_path}/index.db"))
    image = build_oci(tmp_path / "oci", [layer("base", 2000)])
    result = index_image(indexed, image.source, spool_dir=tmp_path / "spool", workers=1)
    ref = layout.layer_ref_key(image.diff_ids[0])
    assert indexed.index.pack_ids()
    assert indexed.index.get_ref(ref)
    indexed.remove_image(result.record.manifest_digest)
    store, known = indexed.store.inner, []
    delete = store.delete

    def watched(key):
        if key.startswith(("indexes/", "refs/layers")):
            known.append((indexed.index.pack_ids(), indexed.index.get_ref(ref)))
        delete(key)

    store.delete = watched
    collector(indexed).remove()
    assert known == [(set(), None), (set(), None)]
    indexed.close()


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_small_batches_come_to_the_same(catalog, tmp_path):
    for number in range(5):
        push(catalog, make_model(tmp_path, f"m{number}", 5000 + number), f"m{number}")
        if number:
            catalog.remove_model(ModelRef(f"m{number}"))
    done = collector(catalog, batch=3).remove()
    assert done.removed == done.due
    assert done.removed["packs"].count == 4
    read(catalog, "m0")


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_the_command(catalog, url, tmp_path, monkeypatch, capsys):
    for name, value in (("FLOE_CONFIG", ""), ("FLOE_INDEX", "none"), ("FLOE_STORE", url)):
        monkeypatch.setenv(name, value)
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    assert main(["gc"]) == 0
    assert "everything in the store is needed" in capsys.readouterr().out
    catalog.remove_model(ModelRef("a"))
    assert main(["gc", "--grace", "0"]) == 0
    shown = capsys.readouterr()
    assert "nothing was removed: that takes --delete" in shown.out
    assert shown.err == ""
    assert main(["gc", "--delete", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["grace_seconds"], told["removed"], told["unneeded"]["packs"]["count"]) == (86400, {}, 1)
    assert main(["gc", "--delete", "--grace", "0s"]) == 0
    shown = capsys.readouterr()
    assert "warning: without a grace period" in shown.err
    assert "packs" in shown.out
    assert content(catalog) == set()
    assert main(["gc", "--delete", "--store-timeout", "301"]) == 2
    assert "store_timeout is 301 s" in capsys.readouterr().err
    assert main(["gc", "--grace", "soon"]) == 2
    assert "soon" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_the_record_of_an_attached_image_goes_by_its_digest(catalog, url, tmp_path, monkeypatch, capsys):
    for name, value in (("FLOE_CONFIG", ""), ("FLOE_INDEX", "none"), ("FLOE_STORE", url)):
        monkeypatch.setenv(name, value)
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    image = build_oci(tmp_path / "oci", [layer("base", 10)])
    result = attach(catalog, image.source, f"oci:{tmp_path}/target:t", [(ModelRef("a"), "/models/a")])
    assert main(["image", "rm", "sha256:" + "0" * 64]) == 1
    assert main(["image", "rm", result.manifest_digest]) == 0
    assert result.manifest_digest in capsys.readouterr().out
    assert catalog.attachment(result.manifest_digest) is None
    assert main(["image", "rm", result.manifest_digest]) == 1
