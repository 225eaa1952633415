"""Replaying through a fetcher: demand joins and overtakes, what is here costs nothing, what fails is let be."""

import threading

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read, submit
from support.stores import RecordingStore, SilentStore, SlowStore, UnreachableStore

from floe.fuse.pack_reader import PackReader
from floe.store.cache import CacheWriter, NodeCache
from floe.store.objects.memory import MemoryStore
from floe.store.replay import Run

MIB = 1 << 20
FRAME = 128 << 10


@pytest.fixture
def pack():
    return make_pack(random_content(8 * MIB, 5), FRAME)


@pytest.fixture
def node(tmp_path, pack):
    """Makes readers of `pack` on one cache; closes them."""
    writer = CacheWriter(NodeCache(tmp_path / "cache"))
    writer.cache.add_index(pack.id, pack.index.encode())
    memory = MemoryStore()
    pack.publish(memory)
    readers = []

    def make(wrap=lambda store: store, **options):
        recording = RecordingStore(memory)
        reader = PackReader(wrap(recording), writer, readahead=0, **options)
        readers.append(reader)
        return reader, recording

    yield make
    for reader in readers:
        reader.close()
    writer.close()


def replay(reader, pack, *runs):
    fetched = set()
    reader.replay([Run(pack.id, first, stop) for first, stop in runs], fetched)
    return fetched


def arrived(reader, count):
    return lambda: reader.counters()["kept_stored_frames"] >= count


def test_it_fetches_in_order_and_reads_find_it(node, pack):
    reader, store = node()
    fetched = replay(reader, pack, (40, 44), (3, 4), (0, 2))
    wait_until(arrived(reader, 7))
    assert sorted(number for _, number in fetched) == [0, 1, 3, 40, 41, 42, 43]
    assert [request.start // FRAME for request in store.ops("get_async")] == [40, 3, 0]
    before = store.bytes_read
    for frame in (0, 3, 42):
        assert read(reader, pack.id, frame * FRAME, FRAME) == pack.content[frame * FRAME : (frame + 1) * FRAME]
    assert store.bytes_read == before == 7 * FRAME
    counters = reader.counters()
    assert (counters["profile_requests"], counters["profile_frames"], counters["profile_bytes"]) == (3, 7, 7 * FRAME)
    assert counters["store_requests"] == 0


def test_what_is_here_costs_nothing(node, pack):
    reader, store = node()
    read(reader, pack.id, 0, 4 * FRAME)
    wait_until(arrived(reader, 4))
    before = store.bytes_read
    fetched = replay(reader, pack, (0, 4), (2, 6))
    wait_until(arrived(reader, 6))
    assert sorted(number for _, number in fetched) == [4, 5]
    assert store.bytes_read - before == 2 * FRAME


def test_a_read_joins_what_is_on_its_way(node, pack):
    gate = threading.Event()
    reader, store = node(lambda inner: SlowStore(inner, gate=gate))
    replay(reader, pack, (0, 8))
    wait_until(lambda: reader.counters()["profile_requests"] == 1)
    answer = submit(reader, pack.id, 3 * FRAME, 10)
    gate.set()
    assert answer.wait() == pack.content[3 * FRAME : 3 * FRAME + 10]
    assert len(store.ops("get_async")) == 1


def test_a_read_overtakes_what_waits(node, pack):
    """With replay's requests all silent, a read of something else is answered at once."""
    silent = []

    def wrap(inner):
        silent.append(SilentStore(inner, but_at=63 * FRAME))
        return silent[0]

    reader, _ = node(wrap)
    replay(reader, pack, *((n, n + 1) for n in range(0, 60, 2)))
    wait_until(lambda: reader.counters()["profile_requests"] == 16)  # no more at a time
    assert submit(reader, pack.id, 63 * FRAME, 10).wait() == pack.content[63 * FRAME : 63 * FRAME + 10]
    assert reader.counters()["profile_requests"] == 16
    silent[0].release()
    wait_until(lambda: reader.counters()["profile_requests"] == 30)


def test_it_stays_below_half_of_the_memory(node, pack):
    silent = []

    def wrap(inner):
        silent.append(SilentStore(inner))
        return silent[0]

    reader, _ = node(wrap, budget=2 * MIB)  # an eighth of it is for frames the cache could not keep
    replay(reader, pack, *((n, n + 1) for n in range(0, 60, 2)))
    wait_until(lambda: reader.counters()["profile_requests"] > 0)
    wait_until(lambda: silent[0].waiting == reader.counters()["profile_requests"])
    assert reader.counters()["memory_peak_bytes"] <= 7 * MIB // 8
    silent[0].release()
    wait_until(arrived(reader, 30))


def test_memory_is_left_to_others_when_more_has_arrived(node, pack):
    reader, _ = node(budget=4 * MIB)  # an eighth of seven eighths of it: three frames
    gone = []
    reader._fetcher._replayer._let_go = lambda *what: gone.append(what)
    replay(reader, pack, *((n, n + 1) for n in range(0, 20, 2)))
    wait_until(lambda: arrived(reader, 10)() and not reader._fetcher._replayer.busy)
    assert len(gone) == 7
    assert all(stop - start == FRAME for _, start, stop in gone)


def test_a_run_that_can_never_fit_is_passed_over(node, pack):
    reader, _ = node(budget=MIB)
    fetched = replay(reader, pack, (0, 32), (40, 41))
    wait_until(arrived(reader, 1))
    assert sorted(number for _, number in fetched) == [40]


def test_an_unreachable_store_is_not_asked_on_and_on(node, pack):
    unreachable = []

    def wrap(inner):
        unreachable.append(UnreachableStore(inner))
        return unreachable[0]

    reader, _ = node(wrap)
    replay(reader, pack, *((n, n + 1) for n in range(0, 64, 2)))
    wait_until(lambda: reader.counters()["profile_requests"] and not reader._fetcher._replayer.busy)
    assert reader.counters()["profile_requests"] <= 16 + 4
    unreachable[0].down = False
    assert read(reader, pack.id, 0, 10) == pack.content[:10]


def test_packs_and_frames_that_are_not_there_are_passed_over(node, pack):
    reader, _ = node()
    fetched = set()
    reader.replay([Run("0" * 64, 0, 4), Run(pack.id, 63, 900), Run(pack.id, 5000, 5001)], fetched)
    wait_until(arrived(reader, 1))
    assert fetched == {(pack.id, 63)}


def test_what_nobody_is_known_to_need_waits_for_what_a_profile_names(node, pack):
    gate = threading.Event()
    reader, store = node(lambda inner: SlowStore(inner, gate=gate))
    reader.replay([Run(pack.id, n, n + 1) for n in range(0, 40, 2)], set(), later=True)
    wait_until(lambda: reader.counters()["front_requests"] == 16)  # no more at a time
    replay(reader, pack, (60, 61), (62, 63))
    gate.set()
    wait_until(arrived(reader, 22))
    asked = [request.start // FRAME for request in store.ops("get_async")]
    assert set(asked[:16]) == set(range(0, 32, 2))  # those that waited at the gate go through it in any order
    assert asked[16:] == [60, 62, *range(32, 40, 2)]
    counters = reader.counters()
    assert (counters["front_frames"], counters["front_bytes"], counters["profile_frames"]) == (20, 20 * FRAME, 2)


def test_what_is_withdrawn_is_not_asked_for(node, pack):
    gate = threading.Event()
    reader, _ = node(lambda inner: SlowStore(inner, gate=gate))
    mine = set()
    reader.replay([Run(pack.id, n, n + 1) for n in range(0, 60, 2)], mine, later=True)
    others = replay(reader, pack, (1, 2))
    wait_until(lambda: reader.counters()["front_requests"] == 16)
    reader.stop_replay(mine)
    gate.set()
    wait_until(lambda: arrived(reader, 17)() and not reader._fetcher._replayer.busy)
    assert len(mine) == reader.counters()["front_requests"] == 16
    assert others == {(pack.id, 1)}
