"""Checking and repairing a store: every kind of damage is found, told with whom it concerns, and healed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.images import add, build_oci
from support.somestore import catalog, everything, google, make_model, push, url
from support.stores import LastByteFlipStore, StoreWrapper
from support.trees import read_packs, read_tree

from floe.cli.main import main
from floe.ingest.oci.attach import attach
from floe.ingest.oci.image import index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.damage import report, reported
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import CHUNK
from floe.store.objects import open_store
from floe.store.packindex import PackIndex
from floe.store.packpieces import pieces
from floe.store.protection import Protection
from floe.upkeep import fsck
from floe.upkeep.fsck import Checker
from floe.upkeep.repair import Repairer
from floe.upkeep.verify import Pace

__all__ = ["catalog", "google", "url"]

ONE_STORE = pytest.mark.parametrize("url", ["memory"], indirect=True)
FOLDER = pytest.mark.parametrize("url", ["file"], indirect=True)


def check(catalog, **options):
    return Checker(catalog, **options).run()


def flip(store, key, at=-1):
    data = bytearray(store.get(key))
    data[at] ^= 0xFF
    store.put(key, bytes(data))


def read(catalog, name):
    _, manifest = catalog.resolve_model(ModelRef.parse(name))
    return read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)


def everything_in_it(catalog, tmp_path):
    """Two models that share content, one of them attached to an image, which is indexed: the pushed models and the image."""
    first = push(catalog, make_model(tmp_path, "a", 5000, CHUNK + 100), "a")
    second = push(catalog, make_model(tmp_path, "b", 5000, 9000), "org/b:v1")
    image = build_oci(tmp_path / "oci", [lambda tar: add(tar, "one", b"one" * 50_000)])
    index_image(catalog, image.source, spool_dir=tmp_path / "spool", workers=1)
    attached = attach(catalog, image.source, f"oci:{tmp_path}/target:t", [(ModelRef("a"), "/models/a")])
    return first, second, image, attached


def test_a_sound_store(catalog, tmp_path):
    first, *_ = everything_in_it(catalog, tmp_path)
    before = everything(catalog.store)
    shallow, deep = check(catalog), check(catalog, deep=True)
    assert shallow.faults == deep.faults == []
    assert (deep.models, deep.images, deep.layers, deep.manifests) == (2, 1, 1, 3)
    assert (deep.trees, deep.packs, deep.orphans) == (4, 3, 0)
    assert (shallow.frames, deep.frames) == (0, 5 + 1 + 2)
    packs = sum(info.size for info in catalog.store.list("packs"))
    assert deep.read_bytes == shallow.read_bytes + packs
    assert everything(catalog.store) == before
    catalog.remove_model(ModelRef.parse("org/b:v1"))
    assert (check(catalog).orphans, check(catalog).faults) == (5, [])
    assert first.manifest.packs


DAMAGE = {
    "record": (lambda m: layout.model_ref_key(ModelRef("a")), fsck.RECORD),
    "manifest": (lambda m: layout.manifest_key(m.digest), fsck.MANIFEST),
    "tree": (lambda m: layout.tree_key(m.manifest.tree.digest), fsck.TREE),
    "index": (lambda m: layout.pack_index_key(m.manifest.packs[0].id), fsck.PACK_INDEX),
    "table": (lambda m: layout.chunk_table_key(m.manifest.packs[0].id), fsck.CHUNK_TABLE),
    "pack": (lambda m: layout.pack_key(m.manifest.packs[0].id), fsck.PACK),
}


@ONE_STORE
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("what", DAMAGE)
def test_every_damage_is_found_and_heals(catalog, tmp_path, what, how):
    """Found with whom it concerns; repaired from another store; else made good by the next push, after --repair."""
    first, _, image, attached = everything_in_it(catalog, tmp_path)
    key_of, kind = DAMAGE[what]
    key, store = key_of(first), catalog.store
    whole = everything(store)
    if how == "flipped":
        flip(store, key, at=20)
    elif how == "cut":
        store.put(key, bytes(store.get(key))[:-1])
    else:
        store.delete(key)
    found = check(catalog, deep=True)
    if (what, how) == ("record", "gone"):
        assert found.faults == []
        return
    (fault,) = found.faults
    assert (fault.kind, fault.key, fault.problem) == (kind, key, "missing" if how == "gone" else "damaged")
    # Pack, index and table are shared with the second model.
    shared = ("org/b:v1",) if what in ("index", "table", "pack") else ()
    assert [name for name in fault.models if name != "a"] in (["a:latest"], ["a:latest", *shared])
    assert set(shared) <= set(fault.models)
    assert fault.images == (() if what == "record" else (attached.manifest_digest,))
    if what == "pack" and how == "flipped":
        assert fault.frames == (0,)
    if what != "record":
        copies = open_store("memory://")
        for name, data in whole.items():
            copies.put(name, data)
        mended = open_store("memory://")
        for name, data in everything(store).items():
            mended.put(name, data)
        copied = [replace(fault)]
        Repairer(Catalog(mended, open_index(None)), other=copies, spool=tmp_path).repair(copied)
        assert (copied[0].repair, copied[0].repaired) == ("copied", True)
        assert everything(mended) == whole
    Repairer(catalog).repair(found.faults)
    assert fault.repair == ("removed" if what == "pack" and how != "gone" else "")
    assert not fault.repaired
    push(catalog, tmp_path / "a", "a")
    push(catalog, tmp_path / "b", "org/b:v1")
    attach(catalog, image.source, f"oci:{tmp_path}/target:t", [(ModelRef("a"), "/models/a")])
    read(catalog, "a")
    read(catalog, "org/b:v1")


def test_a_damaged_pack_is_healed_by_the_next_push(catalog, tmp_path):
    home = make_model(tmp_path, "a", 5000, CHUNK + 100)
    pack = push(catalog, home, "a").manifest.packs[0]
    key = layout.pack_key(pack.id)
    flip(catalog.store, key)
    assert check(catalog).faults == []  # only its content is wrong
    found = check(catalog, deep=True)
    assert [(f.key, f.models) for f in found.faults] == [(key, ("a:latest",))]
    Repairer(catalog).repair(found.faults)
    (fault,) = check(catalog).faults
    assert (fault.kind, fault.problem) == ("pack index", "missing")
    assert push(catalog, home, "a").new_packs == 1
    assert check(catalog, deep=True).faults == []
    read(catalog, "a")
    assert [info.key for info in catalog.store.list("gc")] == []


@ONE_STORE
def test_damage_in_transit_is_none(catalog, tmp_path):
    push(catalog, make_model(tmp_path, "a", 5000, CHUNK + 100), "a")
    flipping = LastByteFlipStore(catalog.store, matches="packs/", times=1)
    assert check(Catalog(flipping, open_index(None)), deep=True).faults == []
    assert flipping.times == 0


@ONE_STORE
def test_a_damaged_copy_is_not_taken(catalog, tmp_path):
    pushed = push(catalog, make_model(tmp_path, "a", 5000), "a")
    copies = open_store("memory://")
    for key, data in everything(catalog.store).items():
        copies.put(key, data)
    for key in (layout.pack_key(pushed.manifest.packs[0].id), layout.tree_key(pushed.manifest.tree.digest)):
        flip(catalog.store, key)
        flip(copies, key, at=100)
    found = check(catalog, deep=True)
    before = bytes(catalog.store.get(layout.tree_key(pushed.manifest.tree.digest)))
    Repairer(catalog, other=copies, spool=tmp_path).repair(found.faults)
    assert {fault.kind: fault.repair for fault in found.faults} == {"tree": "", "pack": "removed"}
    assert bytes(catalog.store.get(layout.tree_key(pushed.manifest.tree.digest))) == before


@ONE_STORE
def test_a_pack_that_a_push_relies_on_is_not_removed(catalog, tmp_path):
    pack = push(catalog, make_model(tmp_path, "a", 5000), "a").manifest.packs[0]
    key = layout.pack_key(pack.id)
    flip(catalog.store, key)
    protection = Protection(catalog.store)
    protection.protect([key])
    found = check(catalog, deep=True)
    Repairer(catalog).repair(found.faults)
    assert found.faults[0].repair == ""
    assert catalog.store.head(key)
    protection.close()
    Repairer(catalog).repair(found.faults)
    assert found.faults[0].repair == "removed"


@ONE_STORE
def test_a_pack_that_was_healed_since_it_was_checked_is_not_removed(catalog, tmp_path):
    """Between the two may lie hours."""
    pack = push(catalog, make_model(tmp_path, "a", 5000, CHUNK + 100), "a").manifest.packs[0]
    key = layout.pack_key(pack.id)
    whole = bytes(catalog.store.get(key))
    for damage in (lambda: flip(catalog.store, key), lambda: catalog.store.put(key, whole[:-1])):
        damage()
        found = check(catalog, deep=True)
        catalog.store.put(key, whole)
        Repairer(catalog).repair(found.faults)
        assert [(fault.repair, fault.repaired) for fault in found.faults] == [("healed meanwhile", True)]
        assert check(catalog, deep=True).faults == []


@ONE_STORE
@pytest.mark.parametrize("comes_to", ["indexes/", "chunks/", "packs/"])
def test_what_was_collected_while_it_was_checked_is_no_damage(catalog, tmp_path, comes_to):
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    catalog.remove_model(ModelRef("a"))

    class Collected(StoreWrapper):
        def get(self, key, start=0, length=None):
            if key.startswith(comes_to):
                for prefix in ("indexes", "chunks", "packs"):  # as `floe gc` does it
                    for info in list(self.inner.list(prefix)):
                        self.inner.delete(info.key)
            return self.inner.get(key, start, length)

    assert check(Catalog(Collected(catalog.store), open_index(None)), deep=True).faults == []


@FOLDER
def test_names_that_nobody_can_read_are_told_and_can_be_removed(catalog, url, tmp_path, monkeypatch, capsys):
    for name, value in {"CONFIG": "", "INDEX": "none", "STORE": url, "CACHE_DIR": f"{tmp_path}/cache"}.items():
        monkeypatch.setenv(f"FLOE_{name}", value)
    push(catalog, make_model(tmp_path, "a", 5000), "a")
    digest = "sha256:" + "ab" * 32
    keys = [layout.model_ref_key(ModelRef("x", "1")), layout.image_ref_key(digest), layout.attachment_ref_key(digest)]
    keys.append("refs/images/README")
    for key in keys:
        catalog.store.put(key, b"garbage")
    assert {fault.key for fault in check(catalog).faults} == set(keys)
    assert main(["gc"]) == 1
    assert main(["model", "rm", "x:1"]) == 0
    assert "could not be read" in capsys.readouterr().out
    assert main(["image", "rm", digest]) == 0
    assert main(["image", "rm", digest]) == 1
    assert {fault.key for fault in check(catalog).faults} == set(keys[3:])
    push(catalog, make_model(tmp_path, "b", 5000), "b")  # a stranger's object keeps nobody from pushing
    catalog.store.put("packs/README", b"")
    push(Catalog(open_store(url), open_index(None)), make_model(tmp_path, "c", 5000), "c")


@ONE_STORE
def test_from_the_node_cache(catalog, tmp_path):
    """A complete pack there has the content; what is stored again has the length that the index says, or is not used."""
    pack = push(catalog, make_model(tmp_path, "a", 5000, CHUNK + 100), "a").manifest.packs[0]
    (content,) = read(catalog, "a")[1].values()
    key = layout.pack_key(pack.id)
    whole = bytes(catalog.store.get(key))
    folder = tmp_path / "packs" / pack.id
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(content)
    flip(catalog.store, key)

    def repaired():
        faults = check(catalog, deep=True).faults
        Repairer(catalog, caches=[tmp_path / "packs"], spool=tmp_path).repair(faults)
        return [(fault.repair, fault.repaired) for fault in faults]

    (folder / "complete").touch()
    report(catalog.store, pack.id, [0], [], "a node that met it")
    assert repaired() == [("taken from the node cache", True)]
    assert bytes(catalog.store.get(key)) == whole
    assert reported(catalog.store) == {}
    flip(catalog.store, key)
    (folder / "data").write_bytes(b"\0" + content[1:])
    assert repaired() == [("removed", False)]


@ONE_STORE
def test_a_layer_without_a_ref(catalog, tmp_path):
    *_, image, _ = everything_in_it(catalog, tmp_path)
    catalog.store.delete(layout.layer_ref_key(image.diff_ids[0]))
    (fault,) = check(catalog).faults
    assert (fault.kind, fault.problem, fault.layers) == ("layer", "missing", image.diff_ids)
    assert fault.images == (image.source,)


@ONE_STORE
def test_pieces_are_whole_frames_in_order(catalog, tmp_path):
    pack = push(catalog, make_model(tmp_path, "a", 5 * CHUNK), "a").manifest.packs[0]
    index = PackIndex.decode(catalog.store.get(layout.pack_index_key(pack.id)), pack.id)
    found = list(pieces(index))
    assert [(p.first, p.last) for p in found] == [(0, 8), (8, 16), (16, 20)]
    assert [p.start for p in found] == [index.stored_offsets[p.first] for p in found]
    assert sum(p.size for p in found) == index.stored_size


def test_the_pace(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr("floe.upkeep.verify.time.monotonic", lambda: now[0])
    monkeypatch.setattr("floe.upkeep.verify.time.sleep", slept.append)
    pace = Pace(1000)
    for _ in range(3):
        pace.wait(500)
    assert slept == [0.0, 0.5, 1.0]
    Pace(None).wait(1 << 40)
    assert len(slept) == 3


@FOLDER
def test_the_command(catalog, url, tmp_path, monkeypatch, capsys):
    settings = {"CONFIG": "", "INDEX": "none", "STORE": url, "CACHE_DIR": f"{tmp_path}/cache"}
    for name, value in settings.items():
        monkeypatch.setenv(f"FLOE_{name}", value)
    home = make_model(tmp_path, "a", 5000)
    pack = push(catalog, home, "a").manifest.packs[0]
    assert main(["fsck", "--deep", "--rate", "1GiB"]) == 0
    assert "no damage was found" in capsys.readouterr().out
    key = layout.pack_key(pack.id)
    copy = open_store(f"file://{tmp_path}/copy")
    copy.put(key, catalog.store.get(key))
    flip(catalog.store, key)
    assert main(["fsck"]) == 0
    capsys.readouterr()
    assert main(["fsck", "--deep"]) == 3
    shown = capsys.readouterr()
    assert f"pack {pack.id}" in shown.out
    assert "model a:latest" in shown.out
    assert "push it or index it again" in shown.err
    assert main(["fsck", "--deep", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["damaged"], told["faults"][0]["models"], told["faults"][0]["frames"]) == (True, ["a:latest"], [0])
    assert main(["fsck", "--deep", "--repair", "--from", copy.url]) == 0
    assert "copied" in capsys.readouterr().out
    assert main(["fsck", "--deep"]) == 0
    flip(catalog.store, key)
    assert main(["fsck", "--deep", "--repair"]) == 3
    assert "removed" in capsys.readouterr().out
    assert main(["model", "push", str(home), "a"]) == 0
    assert main(["fsck", "--deep"]) == 0
    for wrong in (["fsck", "--from", copy.url], ["fsck", "--deep", "--rate", "0"]):
        assert main(wrong) == 2
    monkeypatch.setenv("FLOE_STORE", f"file://{tmp_path}/none")
    assert main(["fsck"]) == 1
