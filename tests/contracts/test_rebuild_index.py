"""The index from the bucket alone: complete, repeatable, harmless to stop, over both kinds of index."""

from __future__ import annotations

import json

import pytest
from support import redis_server
from support.images import add, build_oci
from support.somestore import make_model, push
from support.stores import CountdownFailureStore, RecordingStore

from floe.cli.main import main
from floe.ingest.oci.image import index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, UnavailableError
from floe.store.index import open_index
from floe.store.index.status import index_status
from floe.store.objects import open_store
from floe.store.packindex import PackIndex, decode_chunk_table
from floe.upkeep.rebuild import rebuild_index


@pytest.fixture(params=["sqlite", "redis"])
def index_url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:{tmp_path}/index.db"
    server = redis_server.standalone()
    server.empty()
    return server.url()


@pytest.fixture
def store(tmp_path):
    """Two models and an image in a memory store, pushed without an index."""
    made = open_store("memory://", retry=False)
    catalog = Catalog(made, open_index(None))
    push(catalog, make_model(tmp_path, "a", 5000, 70_000), "a")
    push(catalog, make_model(tmp_path, "b", 5000, 90_000), "b")
    image = build_oci(tmp_path / "oci", [lambda tar: add(tar, "one", b"one" * 5000)])
    index_image(catalog, image.source, spool_dir=tmp_path / "spool", workers=1)
    return made


class Progress:
    def __init__(self):
        self.wanted = self.done = 0

    def total(self, nbytes):
        self.wanted = nbytes

    def advance(self, nbytes):
        self.done += nbytes


def chunks(store):
    found = {}
    for info in store.list(layout.PACK_INDEXES):
        pack_id = info.key.rpartition("/")[2]
        index = PackIndex.decode(store.get(info.key), pack_id)
        for entry in decode_chunk_table(store.get(layout.chunk_table_key(pack_id)), index, pack_id):
            found[entry.digest, entry.length] = (pack_id, entry.block)
    return found


def check_complete(index, store):
    wanted = chunks(store)
    assert len(wanted) == 4  # files of three sizes, one of them in both models, and a layer's
    places = index.find_chunks(wanted)
    assert {key: (place.pack_id, place.block) for key, place in places.items()} == wanted
    for prefix in (layout.LAYER_REFS, layout.CHAIN_REFS):
        for info in store.list(prefix):
            assert index.get_ref(info.key) == bytes(store.get(info.key))


def test_all_of_it_and_again(store, index_url, tmp_path):
    index = open_index(index_url)
    progress = Progress()
    done = rebuild_index(Catalog(store, index), progress)
    assert (done.packs, done.chunks, done.refs, done.gone, done.left_out) == (3, 4, 2, 0, {})
    assert index_status(index_url, Catalog(store, index).check_store().uuid, 10)["state"] == "ok"
    assert progress.done == progress.wanted > 0
    check_complete(index, store)
    again = rebuild_index(Catalog(store, index))
    assert again == done
    check_complete(index, store)
    # A push finds all it has there, and reads no chunk table.
    recorded = RecordingStore(store)
    assert push(Catalog(recorded, index), tmp_path / "a", "again").new_packs == 0
    assert recorded.ops("get", layout.CHUNK_TABLES) == []
    index.close()


def test_what_is_wrong_is_replaced_and_what_is_gone_is_forgotten(store, index_url):
    index = open_index(index_url)
    catalog = Catalog(store, index)
    catalog.ensure_store()
    pack_id = next(store.list(layout.PACKS)).key.rpartition("/")[2]
    bad = PackIndex.decode(store.get(layout.pack_index_key(pack_id)), pack_id)
    entries = decode_chunk_table(store.get(layout.chunk_table_key(pack_id)), bad, pack_id)
    index.add_pack(pack_id, [type(entry)(entry.digest, entry.length + 1, 7) for entry in entries])
    index.add_pack("0" * 64, entries)
    layer = next(store.list(layout.LAYER_REFS)).key
    index.put_ref(layer, b"{}")
    assert rebuild_index(catalog).gone == 1
    check_complete(index, store)
    assert index.find_chunks([(entry.digest, entry.length + 1) for entry in entries]) == {}
    assert "0" * 64 not in index.pack_ids()
    index.close()


@pytest.mark.parametrize("index_url", ["sqlite"], indirect=True)
def test_stopped_anywhere_it_is_begun_again(store, index_url, tmp_path):
    index = open_index(index_url)
    for number in range(1, 40):
        failing = CountdownFailureStore(store, fail_get={number: UnavailableError("cut off")})
        try:
            rebuild_index(Catalog(failing, index))
        except UnavailableError:
            push(Catalog(store, index), tmp_path / "a", "meanwhile")
            continue
        break
    assert 5 < number < 40
    check_complete(index, store)
    index.close()


def test_damaged_packs_and_refs_are_left_out(store, tmp_path):
    index = open_index(f"sqlite:{tmp_path}/index.db")
    pack = next(store.list(layout.PACKS)).key
    store.put(pack, b"short")
    layer = next(store.list(layout.LAYER_REFS)).key
    store.put(layer, b"{}")
    done = rebuild_index(Catalog(store, index))
    assert set(done.left_out) == {pack.rpartition("/")[2], layer}
    assert pack.rpartition("/")[2] not in index.pack_ids()
    assert index.get_ref(layer) is None
    index.close()


def test_without_an_index(store):
    with pytest.raises(BadInputError, match="no index is set"):
        rebuild_index(Catalog(store, open_index(None)))


def test_the_command(tmp_path, monkeypatch, capsys):
    settings = {"CONFIG": "", "INDEX": f"sqlite:{tmp_path}/i.db", "STORE": f"file://{tmp_path}/store"}
    for name, value in settings.items():
        monkeypatch.setenv(f"FLOE_{name}", value)
    assert main(["rebuild-index"]) == 1  # there is no store
    push(Catalog(open_store(settings["STORE"]), open_index(None)), make_model(tmp_path, "a", 5000), "a")
    capsys.readouterr()
    assert main(["rebuild-index"]) == 0
    assert "knows 1 chunks in 1 packs" in capsys.readouterr().out
    assert main(["rebuild-index", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packs"] == 1
    assert main(["rebuild-index", "--index", "none"]) == 2
