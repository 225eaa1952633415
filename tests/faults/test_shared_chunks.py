"""Trees that come into the store side by side: common content is stored once, common room is kept to, and nobody hangs."""

from __future__ import annotations

import io
import os
import random
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support import images
from support.stores import CountdownFailureStore, RecordingStore, StoreWrapper
from support.trees import content_of, read_packs, read_tree

from floe.ingest import packwriter, publish
from floe.ingest.oci.image import index_image
from floe.ingest.publish import Ingest
from floe.ingest.session import Session
from floe.ingest.spool import Room
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import CancelledError, UnavailableError
from floe.store.index import open_index
from floe.store.nodes import CHUNK, Node, find
from floe.store.objects import open_store
from floe.store.packindex import LAYER_FRAME
from floe.store.records import KIND_LAYER

WAIT = 20


@pytest.fixture
def store():
    return RecordingStore(open_store("memory://", retry=False))


@pytest.fixture
def catalog(store):
    with closing(Catalog(store, open_index(None))) as made:
        yield made


class Bench:
    """Ingests of one session, and the trees they are to make."""

    def __init__(self, catalog, home, **options):
        self.catalog, self.home = catalog, home
        self.session = Session(catalog.store, **options)
        self.trees = {}

    def ingest(self, **options):
        return Ingest(self.catalog, spool_dir=self.home, frame_size=LAYER_FRAME, session=self.session, **options)

    def add(self, ingest, *datas):
        root = self.trees.setdefault(ingest, Node(stat.S_IFDIR | 0o755))
        for data in datas:
            content = ingest.add_stream(io.BytesIO(data), len(data))
            root.children[b"%d" % len(root.children)] = Node(stat.S_IFREG | 0o644, content=content)
        ingest._settle()

    def finish(self, ingest):
        return ingest.finish(self.trees[ingest], KIND_LAYER, "test")[1]

    def contents(self, manifest):
        packs = read_packs(self.catalog, manifest)
        tree = read_tree(self.catalog, manifest.tree.digest)
        return [content_of(tree.children[b"%d" % number], packs) for number in range(len(tree.children))]


@pytest.fixture
def bench(catalog, tmp_path):
    return Bench(catalog, tmp_path)


def check_order(store, catalog):
    """Every tree and manifest was written after all the packs that it names."""
    puts = [request.key for request in store.requests if request.op.startswith("put")]
    for info in store.list(layout.MANIFESTS):
        manifest = catalog.get_manifest(info.key.rpartition("/")[2])
        tree = puts.index(layout.tree_key(manifest.tree.digest))
        assert tree < puts.index(info.key)
        for pack in manifest.packs:
            assert puts.index(layout.pack_index_key(pack.id)) < tree


def test_common_content_is_stored_by_one_and_awaited_by_the_other(bench, store):
    common, mine = random.randbytes(2 * CHUNK + 5), random.randbytes(70_000)
    with bench.ingest() as first, bench.ingest() as second, ThreadPoolExecutor(1) as pool:
        bench.add(first, common)
        bench.add(second, mine, common, common)
        waiting = pool.submit(bench.finish, second)
        # Its own content goes to the store meanwhile: nobody may have to wait for it in turn.
        assert _until(lambda: len(store.ops("put", layout.PACK_INDEXES)) == 1)
        assert not waiting.done()
        assert store.ops("put", layout.TREES) == []
        first.flush()
        manifest = waiting.result(WAIT)
        assert bench.contents(manifest) == [mine, common, common]
        assert bench.contents(bench.finish(first)) == [common]
        assert (first.stats.new_packs, second.stats.new_packs) == (1, 1)
        assert second.stats.deduplicated_bytes == 2 * len(common)
    check_order(store, bench.catalog)


def _until(condition):
    event = threading.Event()
    for _ in range(WAIT * 100):
        if condition():
            return True
        event.wait(0.01)
    return False


def test_two_that_rely_on_each_other_both_finish(bench, store):
    one, other = random.randbytes(100_000), random.randbytes(100_000)
    with bench.ingest() as first, bench.ingest() as second, ThreadPoolExecutor(2) as pool:
        bench.add(first, one)
        bench.add(second, other)
        bench.add(first, other)
        bench.add(second, one)
        jobs = [pool.submit(bench.finish, ingest) for ingest in (first, second)]
        assert [bench.contents(job.result(WAIT)) for job in jobs] == [[one, other], [other, one]]
    assert len(store.ops("put", layout.PACK_INDEXES)) == 2
    check_order(store, bench.catalog)


def test_who_comes_late_finds_it_in_the_store(bench, store):
    data = random.randbytes(100_000)
    with bench.ingest() as first, bench.ingest() as second:
        bench.add(first, data)
        first.flush()
        bench.add(second, data)
        assert bench.contents(bench.finish(second)) == [data]
    assert len(store.ops("put", layout.PACK_INDEXES)) == 1


def test_content_stored_between_looking_and_claiming_is_not_stored_again(bench, store, monkeypatch):
    data = random.randbytes(100_000)
    look = bench.catalog.find_chunks
    with bench.ingest() as first, bench.ingest() as second:
        bench.add(first, data)

        def late(keys):
            found = look(keys)
            first.flush()
            return found

        monkeypatch.setattr(bench.catalog, "find_chunks", late)
        bench.add(second, data)
        assert bench.contents(bench.finish(second)) == [data]
    assert len(store.ops("put", layout.PACK_INDEXES)) == 1


def test_who_relies_on_one_that_fails_is_told_and_publishes_nothing(bench, store):
    data = random.randbytes(100_000)
    with bench.ingest() as second, ThreadPoolExecutor(1) as pool:
        with bench.ingest() as first:
            bench.add(first, data)
            bench.add(second, data)
            waiting = pool.submit(bench.finish, second)
        with pytest.raises(CancelledError):
            waiting.result(WAIT)
    assert store.ops("put", layout.TREES) == store.ops("put", layout.PACKS) == []
    with bench.ingest() as third:  # what the failed one had claimed is free again
        bench.add(third, data)
        assert bench.contents(bench.finish(third)) == [data]


def test_who_leaves_stores_only_what_others_rely_on(bench, store):
    data = random.randbytes(100_000)
    with bench.ingest() as alone:
        bench.add(alone, data)
        alone.leave()
    assert store.ops("put", layout.PACKS) == []
    with bench.ingest() as first, bench.ingest() as second:
        bench.add(first, data)
        bench.add(second, data)
        first.leave()
        assert bench.contents(bench.finish(second)) == [data]
    assert len(store.ops("put", layout.PACK_INDEXES)) == 1


def test_packs_of_others_count_towards_the_limit(bench, store):
    datas = [random.randbytes(5000 + 5000 * number) for number in range(6)]
    with ExitStack() as stack:
        lenders = [stack.enter_context(bench.ingest()) for _ in datas]
        borrower = stack.enter_context(bench.ingest(max_packs=3))
        for lender, data in zip(lenders, datas, strict=True):
            bench.add(lender, data)
        bench.add(borrower, b"mine", *datas)
        for lender in lenders:
            lender.flush()
        manifest = bench.finish(borrower)
        assert bench.contents(manifest) == [b"mine", *datas]
        assert len(manifest.packs) <= 3
        for lender, data in zip(lenders, datas, strict=True):
            assert bench.contents(bench.finish(lender)) == [data]
    check_order(store, bench.catalog)


# Layers of an image


@pytest.fixture
def together(catalog, monkeypatch):
    """Both layers look what is stored before either has stored anything."""
    look, barrier, calls = catalog.find_chunks, threading.Barrier(2), []

    def find_chunks(keys):
        found = look(keys)
        calls.append(threading.get_ident())
        if calls.count(threading.get_ident()) == 1:
            barrier.wait(WAIT)
        return found

    monkeypatch.setattr(catalog, "find_chunks", find_chunks)


@pytest.mark.usefixtures("together")
def test_a_file_in_two_layers_is_stored_once(catalog, store, tmp_path):
    weights = random.randbytes(5 * CHUNK + 1)
    layers = [images.files({"w": weights, "x": b"x"}), images.files({"again": weights, "y": b"y"})]
    built = images.build_oci(tmp_path / "image", layers, compression="")
    result = index_image(catalog, built.source, spool_dir=tmp_path, workers=2)
    stored = sum(info.size for info in store.list(layout.PACKS))
    assert len(weights) <= stored == result.new_bytes < len(weights) + 100_000
    for layer, name in zip(result.layers, (b"w", b"again"), strict=True):
        manifest = catalog.get_manifest(layer.manifest)
        tree = read_tree(catalog, manifest.tree.digest)
        assert content_of(find(tree, name), read_packs(catalog, manifest)) == weights
    check_order(store, catalog)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("first", ["stub", "layer"])
def test_a_stub_that_meets_a_file_first_does_not_keep_it_from_a_layer(catalog, tmp_path, monkeypatch, first):
    monkeypatch.setattr(publish, "_BATCH_COUNT", 1)  # so that the stub has claimed its files before it is known as one
    stub = images.files({".floe/model.json": "{}", "m/README": "the same text"})
    layers = [stub, images.files({"README": "the same text"})]
    built = images.build_oci(tmp_path / "image", layers if first == "stub" else layers[::-1])
    result = index_image(catalog, built.source, spool_dir=tmp_path, workers=2)
    manifest = next(catalog.get_manifest(layer.manifest) for layer in result.layers if not layer.stub)
    tree = read_tree(catalog, manifest.tree.digest)
    assert content_of(find(tree, b"README"), read_packs(catalog, manifest)) == b"the same text"


@pytest.mark.parametrize("number", range(2, 9))
def test_two_layers_that_share_and_a_store_that_fails(tmp_path, number):
    inner = open_store("memory://", retry=False)
    failing = CountdownFailureStore(inner, fail_put={number: UnavailableError("cut off")})
    weights = random.randbytes(100_000)
    layers = [images.files({"w": weights, "x": b"x" * 9000}), images.files({"w": weights, "y": b"y" * 9000})]
    built = images.build_oci(tmp_path / "image", layers)
    with (
        closing(Catalog(failing, open_index(None))) as catalog,
        pytest.raises(UnavailableError, match="cut off"),
    ):
        index_image(catalog, built.source, spool_dir=tmp_path, workers=2)
    assert list(inner.list("refs")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    with closing(Catalog(inner, open_index(None))) as catalog:
        for layer in index_image(catalog, built.source, spool_dir=tmp_path, workers=2).layers:
            manifest = catalog.get_manifest(layer.manifest)
            tree = read_tree(catalog, manifest.tree.digest)
            assert content_of(find(tree, b"w"), read_packs(catalog, manifest)) == weights


# Room in the spool directory


class MeasuringStore(StoreWrapper):
    """Notes how much lies in the spool directories whenever a pack is uploaded; some uploads fail."""

    def __init__(self, inner, spool, fail_from=1 << 30):
        super().__init__(inner)
        self.spool, self.fail_from = spool, fail_from
        self.most = self.uploads = 0
        self._lock = threading.Lock()

    def put_file(self, key, path, progress=None):
        with self._lock:
            self.uploads += 1
            # os.walk passes over directories that another ingest takes away meanwhile.
            held = (_size(Path(folder, name)) for folder, _, names in os.walk(self.spool) for name in names)
            self.most = max(self.most, sum(held))
            if self.uploads >= self.fail_from:
                raise UnavailableError("cut off")
        super().put_file(key, path, progress)


def _size(path):
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def fill(bench, datas):
    with bench.ingest() as ingest:
        bench.add(ingest, *datas)
        return bench.finish(ingest)


def test_side_by_side_they_keep_to_the_room(tmp_path):
    room = 8 * CHUNK
    store = MeasuringStore(open_store("memory://"), tmp_path)
    inputs = [[random.randbytes(CHUNK) for _ in range(5)] + [random.randbytes(300_000)] for _ in range(4)]
    with closing(Catalog(store, open_index(None))) as catalog, ThreadPoolExecutor(4) as pool:
        bench = Bench(catalog, tmp_path, spool_bytes=room)
        manifests = list(pool.map(lambda datas: fill(bench, datas), inputs, timeout=60))
        for manifest, datas in zip(manifests, inputs, strict=True):
            assert bench.contents(manifest) == datas
    assert 0 < store.most <= room + (1 << 20)  # a piece that is moved while sections are joined counts twice
    assert bench.session.room.take(room, lambda: False, wait=False)  # all of it was given back


def test_without_room_a_pack_is_sealed_before_it_is_full(tmp_path, catalog):
    bench = Bench(catalog, tmp_path, spool_bytes=8 * CHUNK)
    datas = [random.randbytes(CHUNK) for _ in range(9)]
    with bench.ingest() as first, bench.ingest() as second:
        bench.add(first, *datas[:5])
        bench.add(second, *datas[5:])
        assert (first.stats.new_packs, second.stats.new_packs) == (0, 1)
        assert bench.contents(bench.finish(second)) == datas[5:]
        assert bench.contents(bench.finish(first)) == datas[:5]
        assert (first.stats.new_packs, second.stats.new_packs) == (1, 2)


def test_uploads_that_fail_leave_nobody_waiting_for_room(tmp_path):
    store = MeasuringStore(open_store("memory://", retry=False), tmp_path, fail_from=2)
    with closing(Catalog(store, open_index(None))) as catalog, ThreadPoolExecutor(4) as pool:
        bench = Bench(catalog, tmp_path, spool_bytes=4 * CHUNK)
        jobs = [pool.submit(fill, bench, [random.randbytes(CHUNK) for _ in range(6)]) for _ in range(4)]
        assert [type(job.exception(60)) for job in jobs] == [UnavailableError] * 4
    assert list(tmp_path.iterdir()) == []
    assert bench.session.room.take(4 * CHUNK, lambda: False, wait=False)


def test_who_waits_for_room_can_be_stopped(tmp_path, catalog):
    session = Session(catalog.store, spool_bytes=CHUNK)
    assert session.room.take(CHUNK, lambda: session.stopping, wait=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.room.take, 1, lambda: session.stopping, wait=True)
        assert not session.room.take(1, lambda: session.stopping, wait=False)
        session.stop()
        with pytest.raises(CancelledError):
            waiting.result(WAIT)


def test_what_is_larger_than_the_room_passes_alone():
    room = Room(10)
    assert room.take(11, lambda: False, wait=False)
    assert not room.take(1, lambda: False, wait=False)
    room.give_back(11)
    assert room.take(10, lambda: False, wait=False)


def test_sections_are_joined_without_taking_room_twice(tmp_path, catalog, monkeypatch):
    monkeypatch.setattr(packwriter, "_JOIN", 100_000)
    bench = Bench(catalog, tmp_path)
    datas = [random.randbytes(CHUNK), *(random.randbytes(300_001) for _ in range(5))]
    with bench.ingest() as ingest:
        bench.add(ingest, *datas)
        manifest = bench.finish(ingest)
    assert len(manifest.packs) == 1
    assert bench.contents(manifest) == datas
