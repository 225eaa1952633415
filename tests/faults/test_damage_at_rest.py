"""Packs that rot in the store: found by readers, reported by name, healed by a push of what they hold."""

from __future__ import annotations

import random
import time

import pytest
from support import images
from support.floe_node import wait_until
from support.reading import read, submit
from support.stored import pack_content
from support.stores import StoreWrapper

from floe.fuse.damage import DamageReports
from floe.fuse.pack_reader import PackReader
from floe.fuse.residency import Mounted
from floe.ingest.model import push_model
from floe.ingest.oci.image import index_image
from floe.store import damage, layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, DamagedError, StoreMissingError, UnavailableError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store

MIB = 1 << 20
CHUNK = 4 * MIB


@pytest.fixture
def store():
    return open_store("memory://")


@pytest.fixture
def model(tmp_path):
    """Two large files, and two small ones that share a frame."""
    generator = random.Random(11)
    home = tmp_path / "model"
    home.mkdir()
    for name in ("one", "two"):
        (home / name).write_bytes(generator.randbytes(CHUNK))
    for name in ("x", "y"):
        (home / name).write_bytes(generator.randbytes(5000))
    return home


@pytest.fixture
def push(store, tmp_path):
    def push(directory, name="m", **options):
        catalog = Catalog(store, open_index(None))
        return push_model(catalog, directory, ModelRef(name), spool_dir=tmp_path / "spool", **options)

    return push


def part(model, tmp_path, *names):
    """A directory with some of a model's files."""
    home = tmp_path / "-".join(("part", *names))
    home.mkdir()
    for name in names:
        (home / name).write_bytes((model / name).read_bytes())
    return home


def rot(store, pack_id, at):
    """Flip a bit of the stored pack; its bytes before."""
    key = layout.pack_key(pack_id)
    before = bytes(store.get(key))
    store.put(key, before[:at] + bytes([before[at] ^ 4]) + before[at + 1 :])
    return before


def stored(store, pack_id):
    return bytes(store.get(layout.pack_key(pack_id)))


def objects(store):
    return {info.key for info in store.list("")}


def test_a_reported_pack_is_healed_by_the_same_push(store, model, push):
    first = push(model)
    (pack,) = first.manifest.packs
    before = rot(store, pack.id, 100)
    rot(store, pack.id, 5 * MIB)
    assert push(model).repaired == {}  # nobody has read it, and a push does not
    damage.report(store, pack.id, [0], ["models/m"], "node-7")
    names = objects(store) - {layout.damage_key(pack.id)}
    again = push(model)
    assert again.repaired == {pack.id: 2}  # the one that nobody met, too
    assert stored(store, pack.id) == before
    assert (again.digest, again.previous, again.new_packs) == (first.digest, first.digest, 0)
    assert objects(store) == names


def test_verify_finds_what_nobody_reported(store, model, push):
    (pack,) = push(model).manifest.packs
    before = rot(store, pack.id, CHUNK + 7)
    assert push(model, verify=True).repaired == {pack.id: 1}
    assert stored(store, pack.id) == before
    assert push(model, verify=True).repaired == {}


def test_who_has_only_part_of_a_pack_heals_that(store, model, push, tmp_path):
    (pack,) = push(model).manifest.packs
    before = rot(store, pack.id, 100)  # of "one"
    rot(store, pack.id, CHUNK + 100)  # of "two"
    damage.report(store, pack.id, [0, 4], [], "node")
    two = push(part(model, tmp_path, "two"), "two")
    assert two.repaired == {pack.id: 1}
    assert [entry.id for entry in two.manifest.packs] == [pack.id]
    assert stored(store, pack.id)[CHUNK:] == before[CHUNK:]
    assert damage.reported(store)[pack.id].frames == (0,)
    assert push(model).repaired == {pack.id: 1}
    assert stored(store, pack.id) == before
    assert damage.reported(store) == {}


def test_what_cannot_be_healed_is_stored_anew(store, model, push, tmp_path):
    (pack,) = push(model).manifest.packs
    rot(store, pack.id, 2 * CHUNK + 100)  # "x" and "y" share this frame
    rotten = stored(store, pack.id)
    damage.report(store, pack.id, [8], [], "node")
    found = push(part(model, tmp_path, "x", "two"), "x")
    assert found.repaired == {}
    assert stored(store, pack.id) == rotten
    assert damage.reported(store)[pack.id].frames == (8,)
    assert pack.id in [entry.id for entry in found.manifest.packs]  # "two" is sound there
    (fresh,) = [entry for entry in found.manifest.packs if entry.id != pack.id]
    assert (model / "x").read_bytes() in pack_content(store, fresh.id)
    assert push(part(model, tmp_path, "x", "y"), "xy").repaired == {pack.id: 1}
    assert damage.reported(store) == {}


@pytest.mark.parametrize("left", [None, 0, 100, 3 * MIB + 5])
def test_a_pack_that_vanished_or_was_cut_is_put_back(store, model, push, left):
    first = push(model)
    (pack,) = first.manifest.packs
    before = stored(store, pack.id)
    if left is None:
        store.delete(layout.pack_key(pack.id))
    else:
        store.put(layout.pack_key(pack.id), before[:left])
    damage.report(store, pack.id, [0], [], "node")
    assert push(model).digest == first.digest
    assert stored(store, pack.id) == before
    assert damage.reported(store) == {}


def test_a_cut_pack_is_not_made_to_look_whole(store, model, push, tmp_path):
    (pack,) = push(model).manifest.packs
    before = stored(store, pack.id)
    store.put(layout.pack_key(pack.id), before[: 2 * MIB])
    damage.report(store, pack.id, [3], [], "node")
    push(part(model, tmp_path, "two"), "two")
    assert stored(store, pack.id) == before[: 2 * MIB]
    assert pack.id in damage.reported(store)


def test_who_may_not_delete_says_healed_in_the_record(store, model, push):
    class Kept(StoreWrapper):
        def delete(self, key):
            raise AccessDeniedError(f"no s3:DeleteObject on {key}")

    (pack,) = push(model).manifest.packs
    rot(store, pack.id, 0)
    damage.report(store, pack.id, [0], ["models/m"], "node")
    damage.settle(Kept(store), pack.id)
    assert layout.damage_key(pack.id) in objects(store)
    assert damage.reported(store) == {}
    damage.report(store, pack.id, [3], [], "another")
    found = damage.reported(store)[pack.id]
    assert (found.frames, found.sources, found.node) == ((3,), (), "another")


def test_reports_of_two_nodes_add_up(store):
    pack = "ab" * 32
    damage.report(store, pack, [3, 1], ["models/m"], "one")
    damage.report(store, pack, [2], ["images/app@linux/amd64#0"], "two")
    found = damage.reported(store)[pack]
    assert (found.frames, found.node) == ((1, 2, 3), "one")
    assert found.sources == ("images/app@linux/amd64#0", "models/m")


def test_a_record_that_cannot_be_read_is_left_out(store, model, push):
    push(model)
    store.put(layout.damage_key("ab" * 32), b"{")
    store.put(layout.damage_key("cd" * 32), damage.DamageRecord("ef" * 32, (1,), (), "n", "t").encode())
    assert damage.reported(store) == {}
    assert push(model).repaired == {}


@pytest.mark.parametrize("verify", [False, True])
def test_indexing_again_heals_layers_that_were_reported(store, tmp_path, verify):
    catalog = Catalog(store, open_index(None))
    generator = random.Random(12)
    contents = [{f"f{n}/{k}": generator.randbytes(150_000) for k in range(4)} for n in range(2)]
    built = images.build_oci(tmp_path / "image", [images.files(content) for content in contents])

    def index(**options):
        return index_image(catalog, built.source, spool_dir=tmp_path / "spool", **options)

    first = index()
    packs = [catalog.layer(layer.diff_id)[1].packs[0].id for layer in first.layers]
    before = [rot(store, pack_id, 200_000) for pack_id in packs]
    assert index().repaired == {}
    if not verify:
        damage.report(store, packs[1], [1], [], "node")
    again = index(verify=verify)
    healed = packs if verify else packs[1:]
    assert again.repaired == dict.fromkeys(healed, 1)
    assert [stored(store, pack_id) == data for pack_id, data in zip(packs, before, strict=True)] == [verify, True]
    assert [layer.manifest for layer in again.layers] == [layer.manifest for layer in first.layers]
    assert (again.new_layers, again.new_packs) == (0, 0)
    assert damage.reported(store) == {}


# readers


class Machine:
    """A reader of one pushed model, and its reports."""

    def __init__(self, store, manifest, folder, reporting=None):
        self.pack = manifest.packs[0].id
        self.writer = CacheWriter(NodeCache(folder / "cache"))
        self.writer.cache.add_index(self.pack, store.get(layout.pack_index_key(self.pack)))
        self.reader = PackReader(store, self.writer, readahead=0, damage_memory=0.05)
        self.reports = DamageReports(
            self.reader.known_damage,
            reporting or store,
            mounted=lambda: [Mounted("t1", "m"), Mounted("t2", None), Mounted("t3", None)],
            packs_of=lambda tree: () if tree == "t3" else (self.pack,),
            source_of=lambda _tree: "images/app@linux/amd64#2",
            settle=0.01,
        )

    def fails(self, offset):
        return isinstance(submit(self.reader, self.pack, offset, 10).wait(), DamagedError)

    def close(self):
        self.reports.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def machine(stack, tmp_path):
    def make(*args):
        made = Machine(*args[:2], tmp_path, *args[2:])
        stack.callback(made.close)
        return made

    return make


def test_a_reader_reports_by_name_and_reads_on_once_it_was_healed(store, model, push, machine, caplog):
    found = push(model)
    node = machine(store, found.manifest)
    rot(store, node.pack, 2 * MIB)
    assert node.fails(2 * MIB)
    wait_until(lambda: damage.reported(store))
    record = damage.reported(store)[node.pack]
    assert (record.frames, record.sources) == ((2,), ("images/app@linux/amd64#2", "models/m"))
    (told,) = node.reports.status()
    assert (told["pack"], told["frames"], told["trees"]) == (node.pack, [2], ["t1", "t2"])
    assert told["sources"] == list(record.sources)
    assert f"pack {node.pack}, of images/app@linux/amd64#2, models/m is damaged" in caplog.text
    assert push(model).repaired == {node.pack: 1}
    time.sleep(0.06)  # damage is believed in for 50 ms here
    assert read(node.reader, node.pack, 2 * MIB, 10) == (model / "one").read_bytes()[2 * MIB : 2 * MIB + 10]
    assert node.reports.status() == []


def test_a_pack_that_vanished_is_reported(store, model, push, machine):
    node = machine(store, push(model).manifest)
    store.delete(layout.pack_key(node.pack))
    submit(node.reader, node.pack, 0, 10).wait()
    wait_until(lambda: damage.reported(store))
    push(model)
    assert read(node.reader, node.pack, 0, 10) == (model / "one").read_bytes()[:10]
    assert node.reports.status() == []


def test_a_store_that_is_away_is_neither_damaged_nor_made_anew(model, machine, tmp_path):
    """As when a node starts before the disk is mounted that its store lies on."""
    home, away = tmp_path / "store", tmp_path / "away"
    catalog = Catalog(open_store(f"file://{home}"), open_index(None))
    manifest = push_model(catalog, model, ModelRef("m"), spool_dir=tmp_path / "spool").manifest
    home.rename(away)
    opened_without = open_store(f"file://{home}")
    away.rename(home)
    node = machine(catalog.store, manifest, opened_without)
    home.rename(away)
    assert isinstance(submit(node.reader, node.pack, 0, 10).wait(), StoreMissingError)
    assert node.reports.status() == []
    with pytest.raises(StoreMissingError):
        damage.report(opened_without, node.pack, [0], [], "node")
    away.rename(home)
    assert read(node.reader, node.pack, 0, 10) == (model / "one").read_bytes()[:10]
    assert damage.reported(catalog.store) == {}


def test_a_node_that_may_only_read_says_so_and_what_to_do(store, model, push, machine, caplog):
    class ReadOnly(StoreWrapper):
        def put_if(self, key, data, version):
            raise AccessDeniedError("no s3:PutObject")

    node = machine(store, push(model).manifest, ReadOnly(store))
    rot(store, node.pack, 0)
    assert node.fails(0)
    wait_until(lambda: "push with --verify" in caplog.text)
    assert damage.reported(store) == {}
    assert len(node.reports.status()) == 1


def test_a_report_that_the_store_does_not_take_is_made_again(store, model, push, machine, monkeypatch):
    class Once(StoreWrapper):
        tries = 0

        def put_if(self, key, data, version):
            self.tries += 1
            if self.tries == 1:
                raise UnavailableError("down")
            return self.inner.put_if(key, data, version)

    monkeypatch.setattr("floe.fuse.damage._AGAIN", 0.05)
    once = Once(store)
    node = machine(store, push(model).manifest, once)
    rot(store, node.pack, 0)
    assert node.fails(0)
    wait_until(lambda: damage.reported(store))
    assert once.tries == 2
