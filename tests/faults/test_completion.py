"""Background completion through a fetcher: who reads comes first, what fails is left alone, a full cache ends it."""

import logging
import threading
import time

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read, submit
from support.stores import LastByteFlipStore, RecordingStore, SilentStore, SlowStore, StoreWrapper, UnreachableStore

from floe.fuse.pack_reader import PackReader
from floe.store import completion, layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.completion import DONE, FULL, RESTING, WAITING, Order
from floe.store.objects.memory import MemoryStore
from floe.store.replay import Run

MIB = 1 << 20
FRAME = 128 << 10
SIZE = 8 * MIB
FRAMES = SIZE // FRAME


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(completion, "_QUIET", 0.05)
    monkeypatch.setattr(completion, "_REST_FIRST", 0.02)
    monkeypatch.setattr(completion, "_TICK_FULL", 0.05)


@pytest.fixture(scope="module")
def pack():
    return make_pack(random_content(SIZE, 5), FRAME)


@pytest.fixture(scope="module")
def other():
    return make_pack(random_content(SIZE, 6), FRAME)


@pytest.fixture
def node(tmp_path, pack, other):
    """Makes readers of the packs on one cache; closes them."""
    memory = MemoryStore()
    made, closed = [], []

    def make(wrap=lambda store: store, *, size=None, **options):
        writer = CacheWriter(NodeCache(tmp_path / "cache", size=size))
        for found in (pack, other):
            found.publish(memory)
            writer.cache.add_index(found.id, found.index.encode())
        recording = RecordingStore(memory)
        reader = PackReader(wrap(recording), writer, readahead=0, **options)
        made.extend((writer, reader))
        reader.closed = closed  # what the test closed itself
        return reader, recording, writer

    yield make
    for each in reversed(made):
        if each not in closed:
            each.close()


def order(pack, *runs, always=False):
    return Order(pack.id, [Run(pack.id, *run) for run in runs or ((0, FRAMES),)], always=always)


def complete(reader, *orders):
    reader.complete(orders)
    wait_until(lambda: all(found.state == DONE for found in orders))


def test_all_of_it_comes_once_and_the_pack_is_complete(node, pack):
    reader, store, writer = node()
    complete(reader, order(pack))
    wait_until(lambda: writer.pack(pack.id).complete)
    assert store.bytes_read == len(pack.stored)
    assert reader.counters()["completion_bytes"] == len(pack.stored)
    assert read(reader, pack.id, 3 * FRAME, 100) == pack.content[3 * FRAME : 3 * FRAME + 100]
    assert reader.counters()["store_requests"] == 0
    wait_until(lambda: reader.counters()["memory_bytes"] == 0)


def test_only_what_is_wanted_and_not_here_is_fetched(node, pack, other):
    reader, store, writer = node()
    read(reader, pack.id, 4 * FRAME, FRAME)
    wait_until(lambda: reader.counters()["kept_stored_frames"] == 1)
    store.clear()
    complete(reader, order(pack, (8, 10), (2, 6)))
    assert writer.pack(pack.id).bits.present() == [2, 3, 4, 5, 8, 9]
    starts = [request.start // FRAME for request in store.ops("get_async")]
    assert sorted(starts) == [2, 5, 8]
    assert starts[0] == 8
    assert writer.pack(other.id).bits.present() == []


def test_a_worker_s_successor_goes_on_where_the_bitmaps_say(node, pack):
    reader, _, writer = node()
    complete(reader, order(pack, (0, 40)))
    reader.close()
    writer.close()
    reader.closed.extend((reader, writer))
    reader, store, writer = node()
    complete(reader, order(pack))
    assert store.bytes_read == (FRAMES - 40) * FRAME
    wait_until(lambda: writer.pack(pack.id).complete)


def test_what_an_unclean_stop_left_is_hashed_and_not_fetched(node, pack):
    reader, _, writer = node()
    complete(reader, order(pack, (0, FRAMES - 1)))
    pack_here = writer.pack(pack.id)
    pack_here.distrust("another boot")
    with (pack_here.folder / "data").open("r+b") as file:
        file.seek(5 * FRAME)
        file.write(b"spoiled")
    again = order(pack)
    before = reader.counters()["completion_bytes"]
    complete(reader, again)
    wait_until(lambda: pack_here.complete)
    assert reader.counters()["completion_bytes"] - before == 2 * FRAME


def test_idle_waits_while_somebody_does_and_always_does_not(node, pack, other):
    silent = []

    def wrap(inner):
        silent.append(SilentStore(inner, matches=layout.pack_key(other.id)))
        return silent[0]

    reader, _, writer = node(wrap)
    answer = submit(reader, other.id, 0, 10)
    wait_until(lambda: silent[0].waiting == 1)
    idle, always = order(pack, (0, 8)), order(pack, (8, 16), always=True)
    reader.complete([idle, always])
    wait_until(lambda: always.state == DONE)
    assert idle.state == WAITING
    assert writer.pack(pack.id).bits.present() == list(range(8, 16))
    silent[0].release()
    assert answer.wait() == other.content[:10]
    wait_until(lambda: idle.state == DONE)


def test_a_read_overtakes_and_joins(node, pack):
    """With completion's requests all silent, a read is answered at once, and one of the same frames joins them."""
    silent = []

    def wrap(inner):
        silent.append(SilentStore(inner, but_at=63 * FRAME))
        return silent[0]

    reader, store, _ = node(wrap)
    reader.complete([order(pack, (0, 60), always=True)])
    wait_until(lambda: silent[0].waiting == 2)
    assert submit(reader, pack.id, 63 * FRAME, 10).wait() == pack.content[63 * FRAME : 63 * FRAME + 10]
    joined = submit(reader, pack.id, 3 * FRAME, 10)
    assert not joined.came
    silent[0].release()
    assert joined.wait() == pack.content[3 * FRAME : 3 * FRAME + 10]
    assert len(store.ops("get_async")) == 3


def test_it_takes_a_quarter_of_the_memory_at_most(node, pack, other):
    silent = []

    def wrap(inner):
        silent.append(SilentStore(inner))
        return silent[0]

    reader, _, _ = node(wrap, budget=40 * MIB)  # an eighth of it is for frames the cache could not keep
    reader.complete([order(pack), order(other)])
    wait_until(lambda: silent[0].waiting > 0)
    wait_until(lambda: silent[0].waiting == reader.counters()["completion_requests"])
    assert reader.counters()["memory_peak_bytes"] <= 35 * MIB // 4
    silent[0].release()


def test_the_rate_holds(node, pack):
    begun = []

    class Timed(StoreWrapper):
        async def get_async(self, key, start, length):
            begun.append((time.monotonic(), length))
            return await self.inner.get_async(key, start, length)

    reader, _, _ = node(Timed, completion_rate=8 * FRAME)
    complete(reader, order(pack, (0, 32)))
    # Never faster than told, however late this machine is; asked for in pieces of a second at most.
    assert [length for _, length in begun] == [8 * FRAME] * 4
    assert begun[-1][0] - begun[0][0] >= 2.9


def test_an_unreachable_store_is_asked_less_and_less_and_no_reader_is_told(node, pack):
    unreachable = []

    def wrap(inner):
        unreachable.append(UnreachableStore(inner))
        return unreachable[0]

    reader, _, writer = node(wrap)
    found = order(pack)
    reader.complete([found])
    wait_until(lambda: reader.counters()["completion_failures"] >= 4 and found.state == RESTING)
    counters = reader.counters()
    assert counters["completion_requests"] <= 2 * counters["completion_failures"]
    assert counters["failed_reads"] == 0
    unreachable[0].down = False
    assert read(reader, pack.id, 0, 10) == pack.content[:10]
    wait_until(lambda: found.state == DONE)
    wait_until(lambda: writer.pack(pack.id).complete)


def test_a_pack_that_fails_holds_up_no_other(node, pack, other):
    reader, store, writer = node()
    store.inner.delete(layout.pack_key(pack.id))
    bad, good = order(pack), order(other)
    reader.complete([bad, good])
    wait_until(lambda: good.state == DONE)
    assert bad.state != DONE
    wait_until(lambda: writer.pack(other.id).complete)


def test_damage_at_rest_ends_with_the_rest_of_it_here(node, pack):
    reader, _, writer = node(lambda inner: LastByteFlipStore(inner, matches=layout.pack_key(pack.id)))
    found = order(pack, (0, 2))
    complete(reader, found)
    assert reader.counters()["damaged"] == 1
    wait_until(lambda: writer.pack(pack.id).bits.present() == [0])


def test_it_stops_where_the_cache_is_full_and_evicts_nothing(node, pack, other, caplog):
    caplog.set_level(logging.INFO)
    reader, store, writer = node(size=SIZE + 2 * MIB)
    assert read(reader, pack.id, 0, SIZE) == pack.content
    wait_until(lambda: reader.counters()["kept_held_bytes"] == SIZE)
    store.clear()
    found = order(other)
    reader.complete([found])
    wait_until(lambda: found.state == FULL)
    wait_until(lambda: not reader._fetcher._completer._under_way)
    counters = reader.counters()
    assert counters["kept_evicted_bytes"] == 0
    assert counters["kept_held_bytes"] <= SIZE + 2 * MIB
    requests = len(store.ops("get_async"))
    wait_until(lambda: reader._fetcher._completer._timer is not None)
    assert len(store.ops("get_async")) == requests
    assert [record.getMessage() for record in caplog.records if "full" in record.getMessage()] == [
        f"tree {other.id} is not completed: the node cache is full; reads go on as before"
    ]
    writer.evict(4 * MIB)
    wait_until(lambda: found.state != FULL or reader.counters()["kept_held_bytes"] > SIZE - 4 * MIB)


def test_what_completion_brought_goes_before_what_was_read(node, pack, other):
    reader, _, writer = node(size=SIZE)
    read(reader, pack.id, 0, 2 * MIB)
    wait_until(lambda: reader.counters()["kept_held_bytes"] == 2 * MIB)
    complete(reader, order(other, (0, 16)))
    wait_until(lambda: reader.counters()["kept_held_bytes"] == 4 * MIB)
    writer.evict(2 * MIB)
    assert writer.pack(pack.id).bits.present() == list(range(16))
    assert writer.pack(other.id).bits.present() == []


def test_what_a_read_waited_for_counts_as_read(node, pack, other):
    gate = threading.Event()
    reader, _, writer = node(lambda inner: SlowStore(inner, gate=gate))
    reader.complete([order(pack, (0, 4))])
    wait_until(lambda: reader.counters()["completion_requests"] == 1)
    answer = submit(reader, pack.id, 0, 10)
    wait_until(lambda: reader.counters()["reads"] == 1)
    gate.set()
    answer.wait()
    wait_until(lambda: reader.counters()["kept_stored_frames"] == 4)
    assert writer.pack(pack.id).last_use() > 0


def test_a_share_bounds_a_model_and_its_own_oldest_go_first(node, pack, other):
    reader, _, writer = node()
    writer.shares.set("acme/m", 6 * MIB, [pack.id])
    found = order(pack)
    reader.complete([found, order(other, (0, 8))])
    wait_until(lambda: found.state == FULL)
    wait_until(lambda: writer.pack(other.id).bits.present() == list(range(8)))  # others go on
    wait_until(lambda: writer.pack(pack.id).bits.held() == 4 * MIB)
    for start in range(4 * MIB, 8 * MIB, MIB):
        read(reader, pack.id, start, MIB)
        wait_until(lambda: reader.counters()["reads"] == 0 and reader.counters()["memory_bytes"] == 0)
    assert writer.pack(pack.id).bits.held() <= 6 * MIB
    assert writer.pack(pack.id).bits.is_trusted(FRAMES - 1)
    assert writer.pack(other.id).bits.present() == list(range(8))
    writer.shares.set("acme/m", None, [])
    complete(reader, order(pack))
    wait_until(lambda: writer.pack(pack.id).complete)
