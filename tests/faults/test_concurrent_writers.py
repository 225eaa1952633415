"""Two writers at once, or a reader of what is removed: the outcomes that docs/SEMANTICS.md names."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support.images import add, build_oci
from support.somestore import make_model, push
from support.steps import At, SteppedStore
from support.trees import read_packs, read_tree

from floe.ingest.oci.image import index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import ConflictError, NotFoundError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.packindex import PackIndex
from floe.upkeep.fsck import Checker
from floe.upkeep.gc import Collector


@pytest.fixture
def store():
    return open_store("memory://", retry=False)


def catalog_of(store):
    return Catalog(store, open_index(None))


def index(store, image, tmp_path, name):
    return index_image(catalog_of(store), image.source, spool_dir=tmp_path / name, workers=1)


def test_two_indexers_of_one_image(store, tmp_path):
    """The second runs whole before each operation of the first; and both in threads."""
    image = build_oci(tmp_path / "oci", [lambda tar, n=n: add(tar, n, n.encode() * 5000) for n in ("one", "two")])
    for number in range(200):
        inner = open_store("memory://", retry=False)
        at = At(number, lambda inner=inner: index(inner, image, tmp_path, "second"))
        index(SteppedStore(inner, at), image, tmp_path, "first")
        if at.count <= number:
            break
        check_indexed(inner, image)
    assert 20 < number < 200
    barrier = threading.Barrier(2)

    def run(name):
        barrier.wait()
        index(store, image, tmp_path, name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_indexed(store, image)


def check_indexed(store, image):
    catalog = catalog_of(store)
    assert [record.manifest_digest for record in catalog.images()] == [image.manifest_digest]
    checked = Checker(catalog, deep=True).run()
    assert checked.faults == []
    assert (checked.layers, checked.images) == (len(set(image.diff_ids)), 1)
    assert [info.key for info in store.list("gc")] == []


def test_two_pushes_to_one_tag(store, tmp_path):
    push(catalog_of(store), make_model(tmp_path, "before", 100), "m")
    mine, theirs = make_model(tmp_path, "mine", 5000), make_model(tmp_path, "theirs", 6000)
    outcomes = set()
    for number in range(200):
        inner = open_store("memory://", retry=False)
        for info in store.list(""):
            inner.put(info.key, store.get(info.key))
        other = []
        at = At(number, lambda inner=inner, other=other: other.append(push(catalog_of(inner), theirs, "m").digest))
        try:
            winner = push(catalog_of(SteppedStore(inner, at)), mine, "m").digest
            outcomes.add("the later one")
        except ConflictError as error:
            (winner,) = other
            stored = error.hint.partition("@")[2].partition(";")[0]
            read(catalog_of(inner), catalog_of(inner).get_manifest(stored))
            outcomes.add("conflict")
        if at.count <= number:
            break
        found = catalog_of(inner).resolve_model(ModelRef("m"))
        # After the last conditional put of the first push nothing can be in its way any more.
        assert found[0] in (winner, *other)
        read(catalog_of(inner), found[1])
    assert outcomes == {"the later one", "conflict"}


def read(catalog, manifest):
    return read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)


def test_a_reader_of_what_was_removed(store, tmp_path):
    """It reads on for the grace period; afterwards each read says which object is not there."""
    manifest = push(catalog_of(store), make_model(tmp_path, "a", 70_000), "a").manifest
    (pack,) = manifest.packs
    index_of_pack = PackIndex.decode(store.get(layout.pack_index_key(pack.id)), pack.id)  # as a mount keeps it
    catalog_of(store).remove_model(ModelRef("a"))
    with pytest.raises(NotFoundError, match="no model a"):
        catalog_of(store).resolve_model(ModelRef("a"))
    Collector(catalog_of(store), None).remove()
    Collector(catalog_of(store), None).remove()
    read(catalog_of(store), manifest)
    Collector(catalog_of(store), None, grace=0).remove()
    with pytest.raises(NotFoundError, match=pack.id):
        asyncio.run(store.get_async(layout.pack_key(pack.id), 0, index_of_pack.frames[0].stored))
