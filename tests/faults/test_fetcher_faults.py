"""Reads over stores that fail: every answer is right bytes or an honest error, within memory and time."""

import itertools
import threading
import time

import pytest
from support.packs import make_pack, random_content
from support.reading import Answer, read, submit
from support.stores import (
    CountdownFailureStore,
    LastByteFlipStore,
    RecordingStore,
    SilentStore,
    SlowStore,
    StoreWrapper,
    TruncatingStore,
    UnreachableStore,
)

from floe.fuse.pack_reader import PackReader
from floe.store import download, layout, readahead
from floe.store.blocks import Blocks
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    CancelledError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
)
from floe.store.objects.memory import MemoryStore
from floe.store.reading import Read
from floe.store.replay import Run

MIB = 1 << 20
FRAME = 128 << 10
PACKS = layout.PACKS


def eventually(condition, timeout=10.0):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.002)


@pytest.fixture
def memory():
    return MemoryStore()


@pytest.fixture
def pack(memory):
    return make_pack(random_content(4 * MIB, 1), FRAME).publish(memory)


@pytest.fixture
def node(tmp_path):
    """Makes readers on one cache; closes them."""
    writers, readers = [], []

    def make(store, *packs, size=None, readahead=0, **options):
        if not writers:
            writers.append(CacheWriter(NodeCache(tmp_path / "cache", size=size)))
        for pack in packs:
            writers[0].cache.add_index(pack.id, pack.index.encode())
        readers.append(PackReader(store, writers[0], readahead=readahead, **options))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()
    for writer in writers:
        writer.close()


def test_what_cannot_be_told_of_a_read_keeps_no_answer_back(memory, pack, node):
    def stalled(_stall):
        raise RuntimeError("can't start new thread")

    reader = node(SlowStore(memory, 0.4), pack, stalled=stalled)
    answers = [submit(reader, pack.id, offset, 10) for offset in (0, 20, 40)]  # all of one frame
    assert [answer.wait() for answer in answers] == [pack.content[offset : offset + 10] for offset in (0, 20, 40)]
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_a_read_that_joins_a_request_ahead_as_it_fails_is_asked_for_anew(memory, pack, node):
    answer = Answer()

    class FailsOnce(StoreWrapper):
        asked = 0

        async def get_async(self, key, start, length):
            self.asked += 1
            if self.asked == 1:
                fetcher = reader._fetcher
                fetcher._start(Read(fetcher, pack.id, 0, 1000, answer))  # in the same turn of the loop
                raise UnavailableError("503, once")
            return await self.inner.get_async(key, start, length)

    store = FailsOnce(memory)
    reader = node(store, pack)
    reader.replay([Run(pack.id, 0, 2)], set())
    assert answer.wait() == pack.content[:1000]
    assert store.asked == 2


def test_any_range_is_right_and_fetched_once(memory, pack, node):
    store = RecordingStore(memory)
    reader = node(store, pack)
    for offset, length in ((5, 1), (FRAME - 1, 2), (0, 4 * MIB), (4 * MIB - 1, 1), (FRAME, FRAME)):
        assert read(reader, pack.id, offset, length) == pack.content[offset : offset + length]
    assert store.bytes_read == len(pack.stored)


def test_outside_of_the_pack_and_unknown_packs_are_refused(memory, pack, node):
    reader = node(memory, pack)
    for offset, length in ((4 * MIB - 1, 2), (-1, 1), (0, 0)):
        assert isinstance(submit(reader, pack.id, offset, length).wait(), BadInputError)
    assert isinstance(submit(reader, "0" * 64, 0, 1).wait(), NotFoundError)
    assert (reader.lookup(pack.id), reader.lookup("0" * 64), reader.lookup("../x")) == (4 * MIB, None, None)


def test_five_hundred_readers_of_one_frame_cause_one_request(memory, pack, node):
    gate = threading.Event()
    store = RecordingStore(memory)
    reader = node(SlowStore(store, gate=gate), pack)
    answers = [submit(reader, pack.id, i, 64) for i in range(500)]
    gate.set()
    for i, answer in enumerate(answers):
        assert answer.wait() == pack.content[i : i + 64]
    assert len(store.ops("get_async")) == 1


def test_adjacent_reads_that_arrive_together_share_a_request(memory, node):
    pack = make_pack(random_content(24 * MIB, 2), MIB).publish(memory)
    store = RecordingStore(memory)
    silent = SilentStore(store)
    reader = node(silent, pack, budget=256 * MIB)
    first = submit(reader, pack.id, 0, 16 * MIB)
    eventually(lambda: silent.waiting)
    silent.release()
    assert first.wait() == pack.content[: 16 * MIB]
    assert [r.length for r in store.ops("get_async")] == [8 * MIB, 8 * MIB]


def test_a_random_read_fetches_its_frames_and_no_more(memory, pack, node):
    store = RecordingStore(memory)
    reader = node(store, pack)
    read(reader, pack.id, 3 * FRAME + 100, FRAME)
    assert [(r.start, r.length) for r in store.ops("get_async")] == [(3 * FRAME, 2 * FRAME)]


@pytest.mark.parametrize("fault", [LastByteFlipStore, TruncatingStore])
@pytest.mark.parametrize("times", [1, 2])
def test_damage_in_transit_is_fetched_again(memory, pack, node, fault, times):
    store = RecordingStore(fault(memory, PACKS, times))
    reader = node(store, pack)
    assert read(reader, pack.id, 0, 3 * FRAME) == pack.content[: 3 * FRAME]
    # Only the frame that did not match, the last time over the store's other client.
    sizes = [(r.op, r.length) for r in store.ops("get")]
    assert sizes == [("get_async", 3 * FRAME), ("get_async", FRAME), ("get", FRAME)][: times + 1]
    assert reader.counters()["damaged"] == 0


@pytest.mark.parametrize("compressible", [False, True])
def test_damage_at_rest_fails_its_frame_alone_and_is_remembered(memory, node, compressible):
    pack = make_pack(random_content(MIB, 3, compressible=compressible), FRAME)
    offsets = pack.index.stored_offsets
    stored = bytearray(pack.stored)
    stored[offsets[3] - 1] ^= 1  # in frame 2
    memory.put(layout.pack_key(pack.id), bytes(stored))
    store = RecordingStore(memory)
    reader = node(store, pack)
    bad = submit(reader, pack.id, 2 * FRAME, 10)
    good = submit(reader, pack.id, 0, 2 * FRAME)
    after = submit(reader, pack.id, 3 * FRAME, FRAME)
    error = bad.wait()
    assert isinstance(error, DamagedError)
    assert pack.id in str(error)
    assert error.hint
    assert good.wait() == pack.content[: 2 * FRAME]
    assert after.wait() == pack.content[3 * FRAME : 4 * FRAME]
    store.clear()
    assert isinstance(submit(reader, pack.id, 2 * FRAME, 10).wait(), DamagedError)
    assert isinstance(submit(reader, pack.id, 0, MIB).wait(), DamagedError)
    assert [r.start for r in store.requests if r.start == offsets[2]] == []
    assert reader.counters()["damaged"] == 1


def test_a_truncated_object_serves_the_frames_it_has(memory, pack, node):
    memory.put(layout.pack_key(pack.id), pack.stored[: 2 * FRAME + 1])
    reader = node(memory, pack)
    wide = submit(reader, pack.id, 0, 4 * FRAME)
    assert isinstance(wide.wait(), DamagedError)
    assert read(reader, pack.id, 0, 2 * FRAME) == pack.content[: 2 * FRAME]


def test_a_pack_object_that_is_gone_says_so(memory, node):
    pack = make_pack(random_content(MIB, 4), FRAME)
    assert isinstance(submit(node(memory, pack), pack.id, 0, 1).wait(), NotFoundError)


def test_no_permission_is_told_at_once(memory, pack, node):
    store = CountdownFailureStore(memory, fail_get={1: AccessDeniedError("no")})
    reader = node(store, pack)
    assert isinstance(submit(reader, pack.id, 0, 1).wait(), AccessDeniedError)
    assert read(reader, pack.id, 0, 1) == pack.content[:1]


def test_an_error_that_is_none_of_ours_is_tried_again(memory, pack, node):
    store = CountdownFailureStore(memory, fail_get={1: OSError("odd"), 2: UnavailableError("down")})
    assert read(node(store, pack), pack.id, 0, 9) == pack.content[:9]


def test_a_store_that_comes_back_before_the_deadline_harms_nobody(memory, pack, node):
    store = UnreachableStore(memory)
    reader = node(store, pack, deadline=20)
    answer = submit(reader, pack.id, 0, 100)
    eventually(lambda: store.attempts >= 3)
    assert not answer.came
    store.down = False
    assert answer.wait() == pack.content[:100]


def test_the_deadline_names_the_cause(memory, pack, node):
    reader = node(UnreachableStore(memory), pack, deadline=0.3)
    error = submit(reader, pack.id, 0, 100).wait()
    assert isinstance(error, DeadlineError)
    assert "cannot be reached" in str(error)
    assert error.hint == "check the network"


def test_a_silent_store_ends_in_the_deadline_and_its_request_is_cancelled(memory, pack, node):
    store = SilentStore(memory)
    reader = node(store, pack, deadline=0.3)
    error = submit(reader, pack.id, 0, 100).wait()
    assert isinstance(error, DeadlineError)
    eventually(lambda: store.waiting == 0)
    store.release()
    assert read(reader, pack.id, 0, 100) == pack.content[:100]


def test_the_last_reader_that_leaves_cancels_the_request(memory, pack, node):
    store = SilentStore(memory)
    reader = node(store, pack)
    first, second = submit(reader, pack.id, 0, 10), submit(reader, pack.id, 5, 10)
    eventually(lambda: store.waiting == 1)
    first.ticket.cancel()
    assert isinstance(first.wait(), CancelledError)
    assert store.waiting == 1
    second.ticket.cancel()
    second.ticket.cancel()
    assert isinstance(second.wait(), CancelledError)
    eventually(lambda: store.waiting == 0)
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_who_comes_as_a_request_is_cancelled_is_served(memory, pack, node):
    store = SilentStore(memory)
    reader = node(store, pack)
    first = submit(reader, pack.id, 0, 10)
    eventually(lambda: store.waiting == 1)
    first.ticket.cancel()
    second = submit(reader, pack.id, 0, 10)  # handled in the same turn of the loop, most likely
    store.release()
    assert second.wait() == pack.content[:10]


def test_memory_stays_within_the_budget(memory, node):
    packs = [make_pack(random_content(16 * MIB, i, compressible=i == 0), MIB).publish(memory) for i in range(3)]
    reader = node(SlowStore(memory, 0.005), *packs, budget=8 * MIB)
    answers = [(p, o, submit(reader, p.id, o, MIB)) for o in range(4096, 15 * MIB, MIB) for p in packs]
    for p, offset, answer in answers:
        assert answer.wait() == p.content[offset : offset + MIB]
    assert 2 * MIB < reader.counters()["memory_peak_bytes"] <= 7 * MIB
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_stalled_reads_of_a_pack_do_not_delay_another(memory, node):
    stalled = make_pack(random_content(72 * MIB, 5), MIB).publish(memory)
    other = make_pack(random_content(4 * MIB, 6), MIB).publish(memory)
    store = SilentStore(memory, layout.pack_key(stalled.id))
    reader = node(store, stalled, other)
    waiting = [submit(reader, stalled.id, i * MIB + 4096, MIB) for i in range(64)]
    eventually(lambda: reader.counters()["memory_bytes"] > 60 * MIB)
    assert read(reader, other.id, 4096, MIB) == other.content[4096 : MIB + 4096]
    assert not any(answer.came for answer in waiting)
    store.release()
    for i, answer in enumerate(waiting):
        assert answer.wait() == stalled.content[i * MIB + 4096 :][:MIB]


def test_closing_ends_reads_and_refuses_new_ones(memory, pack, node):
    store = SilentStore(memory)
    reader = node(store, pack)
    answers = [submit(reader, pack.id, i * FRAME, 10) for i in range(20)]
    reader.close()
    assert all(isinstance(a.wait(), CancelledError) for a in answers)
    assert isinstance(submit(reader, pack.id, 0, 1).wait(), CancelledError)
    assert store.waiting == 0


def test_without_room_in_the_cache_reads_go_on(memory, pack, node):
    store = RecordingStore(memory)
    reader = node(store, pack, size=0)
    for offset in range(0, FRAME, 4096):
        assert read(reader, pack.id, offset, 4096) == pack.content[offset : offset + 4096]
    assert len(store.requests) == 1  # a frame that could not be stored is kept in memory for the faults that follow
    eventually(lambda: reader.counters()["kept_bypassed_frames"] == 1)


def sequential(reader, pack, step, stop=None):
    for offset in range(0, stop or len(pack.content), step):
        assert read(reader, pack.id, offset, step) == pack.content[offset : offset + step]


def test_reading_ahead_speeds_up_a_slow_store(memory, node):
    pack = make_pack(random_content(32 * MIB, 8), MIB).publish(memory)
    store = RecordingStore(memory)
    reader = node(SlowStore(store, 0.03), pack, readahead=32 * MIB)
    sequential(reader, pack, MIB)
    assert store.bytes_read == 32 * MIB  # nothing twice
    assert len(store.requests) <= 32 / 2  # those it waits for, at most
    assert reader.counters()["readahead_bytes"] > 24 * MIB


def test_what_a_sequential_reader_left_behind_is_let_go(memory, node, monkeypatch):
    passed = []
    monkeypatch.setattr(CacheWriter, "let_go", lambda _, pack_id, start, stop: passed.append((pack_id, start, stop)))
    pack = make_pack(random_content(48 * MIB, 11), MIB).publish(memory)
    sequential(node(memory, pack, readahead=16 * MIB), pack, MIB)
    assert {pack_id for pack_id, _, _ in passed} == {pack.id}
    assert all(before[2] == after[1] for before, after in itertools.pairwise(passed))
    assert passed[0][1] <= 2 * MIB
    assert passed[-1][2] >= 24 * MIB


class SlowDisk:
    """In the place of a writer's put_run: waits until it is let go."""

    def __init__(self, monkeypatch):
        self.go = threading.Event()
        write = CacheWriter.put_run

        def put_run(writer, *arguments, **options):
            assert self.go.wait(60)
            return write(writer, *arguments, **options)

        monkeypatch.setattr(CacheWriter, "put_run", put_run)


@pytest.fixture
def disk(node, monkeypatch):
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.go.set()  # before the readers are closed, whatever happened


class CountedBlocks(Blocks):
    """Knows how much of what was taken is still seen by anybody."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def take(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)
        return super().take(size)

    def _give_back(self, memory):
        self.live -= len(memory)
        super()._give_back(memory)


def test_a_disk_that_hangs_costs_the_cache_frames_and_no_reader_time_or_memory(memory, node, disk):
    pack = make_pack(random_content(96 * MIB, 12), MIB).publish(memory)
    store = RecordingStore(memory)
    reader = node(store, pack, readahead=16 * MIB, budget=32 * MIB)
    blocks = reader._fetcher._requests._delivery._blocks = CountedBlocks()
    sequential(reader, pack, MIB)
    counters = reader.counters()
    assert store.bytes_read == 96 * MIB  # nothing twice
    assert counters["skipped_frames"] > 8
    assert counters["readahead_bytes"] > 8 * MIB
    assert counters["memory_peak_bytes"] <= 28 * MIB
    assert blocks.peak <= 28 * MIB + 2 * 8 * MIB  # beside it what two threads hang at
    disk.go.set()
    eventually(lambda: 0 < reader.counters()["kept_stored_frames"] <= 96 - counters["skipped_frames"])
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_a_disk_that_hangs_does_not_stop_random_reads(memory, node, disk):
    pack = make_pack(random_content(32 * MIB, 15), FRAME).publish(memory)
    store = RecordingStore(memory)
    reader = node(store, pack, budget=8 * MIB)
    for frame in range(0, 256, 2):  # more than fits into memory
        assert read(reader, pack.id, frame * FRAME + 5000, 4096) == pack.content[frame * FRAME + 5000 :][:4096]
    assert reader.counters()["skipped_frames"] > 32
    requests = len(store.requests)
    assert read(reader, pack.id, 254 * FRAME, 4096) == pack.content[254 * FRAME :][:4096]
    assert len(store.requests) == requests  # it waits for the disk, and can be read meanwhile
    disk.go.set()
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_what_is_read_ahead_is_read_from_memory_before_it_is_on_the_disk(memory, node, disk):
    pack = make_pack(random_content(8 * MIB, 13), MIB).publish(memory)
    store = RecordingStore(memory)
    reader = node(store, pack, readahead=16 * MIB)
    for offset in range(0, 3 * MIB + (512 << 10), 256 << 10):
        assert read(reader, pack.id, offset, 256 << 10) == pack.content[offset:][: 256 << 10]
    at = 4 * MIB - 4096
    eventually(lambda: reader.on_hand(pack.id, at, 8192) is not None)
    assert b"".join(reader.on_hand(pack.id, at, 8192)) == pack.content[at:][:8192]  # across two frames
    assert submit(reader, pack.id, at, 8192).wait() == pack.content[at:][:8192]
    assert reader.on_hand(pack.id, 8 * MIB - 4096, 8192) is None
    disk.go.set()
    sequential(reader, pack, MIB)
    assert store.bytes_read == 8 * MIB
    eventually(lambda: reader.counters()["kept_stored_frames"] == 8)
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_many_short_streams_do_not_hold_the_memory_of_the_next(memory, node):
    """Files of some megabytes, read one after another from many places: the memory of those read is there for the next."""
    pack = make_pack(random_content(80 * MIB, 16), FRAME).publish(memory)
    reader = node(SlowStore(memory, 0.005), pack, readahead=16 * MIB, budget=24 * MIB)
    size = 3 * MIB
    starts = [n * 8 * MIB for n in range(10)]
    for start in starts:
        for offset in range(start, start + size, 256 << 10):
            assert read(reader, pack.id, offset, 256 << 10) == pack.content[offset : offset + (256 << 10)]
    # The first reads of each wait, and find out that it is a stream; without memory to read ahead with, all twelve would.
    assert reader.counters()["store_requests"] <= 6 * len(starts)


def test_without_room_in_the_cache_a_stream_is_read_ahead_for_and_read_once(memory, node):
    pack = make_pack(random_content(32 * MIB, 14), MIB).publish(memory)
    store = RecordingStore(memory)
    reader = node(store, pack, size=0, readahead=16 * MIB)
    sequential(reader, pack, MIB)
    assert store.bytes_read == 32 * MIB
    assert reader.counters()["readahead_bytes"] > 24 * MIB


def stream_into_silence(memory, node, pack, at, *, readahead):
    """Read up to `at`, and on to where requests ahead are under way that are not answered: (store, reader, that place)."""
    silent = SilentStore(memory)
    reader = node(silent, pack, readahead=readahead)
    silent.release()
    sequential(reader, pack, MIB, stop=at)
    while True:
        silent.silence()
        while reader.on_hand(pack.id, at, MIB) is not None:
            at += MIB
        time.sleep(0.05)
        if silent.waiting:
            return silent, reader, at
        # All that was asked for came before the silence, and the next is asked for when somebody waits.
        silent.release()
        assert read(reader, pack.id, at, MIB) == pack.content[at : at + MIB]
        at += MIB


def test_a_seek_gives_up_what_was_asked_for_before_it(memory, node):
    pack = make_pack(random_content(96 * MIB, 17), MIB).publish(memory)
    silent, reader, at = stream_into_silence(memory, node, pack, 8 * MIB, readahead=32 * MIB)
    eventually(lambda: reader.counters()["streams_left"] == 1)  # the reader is elsewhere
    held = reader.counters()["memory_peak_bytes"]
    assert held > 8 * MIB
    eventually(lambda: reader.counters()["memory_bytes"] < held)
    silent.release()
    assert read(reader, pack.id, at, MIB) == pack.content[at : at + MIB]  # and may come back


def test_a_reader_that_waits_for_what_was_asked_for_has_not_left(memory, node, monkeypatch):
    monkeypatch.setattr(readahead, "_PATIENCE", 1.0)
    pack = make_pack(random_content(32 * MIB, 18), MIB).publish(memory)
    silent, reader, at = stream_into_silence(memory, node, pack, 4 * MIB, readahead=16 * MIB)
    while True:
        waiting = submit(reader, pack.id, at, MIB)
        time.sleep(0.3)
        if not waiting.came:
            break
        at += MIB  # a request from before the silence brought it a moment later: nobody waits
    before = reader.counters()["streams_left"]
    time.sleep(2.5)  # more than twice the patience
    assert reader.counters()["streams_left"] == before
    silent.release()
    assert waiting.wait() == pack.content[at : at + MIB]


def test_two_interleaved_readers_are_both_read_ahead_for(memory, node):
    pack = make_pack(random_content(32 * MIB, 9), MIB).publish(memory)
    reader = node(SlowStore(memory, 0.01), pack, readahead=8 * MIB)
    for offset in range(0, 16 * MIB, 256 << 10):
        for base in (0, 16 * MIB):
            at = base + offset
            assert read(reader, pack.id, at, 256 << 10) == pack.content[at : at + (256 << 10)]
    counters = reader.counters()
    assert counters["readahead_bytes"] > 20 * MIB
    assert counters["store_requests"] <= 8


def test_random_reads_are_not_read_ahead_for(memory, pack, node):
    reader = node(memory, pack, readahead=8 * MIB)
    for frame in (3, 20, 9, 30, 0, 14):
        read(reader, pack.id, frame * FRAME + 5000, 4096)
    assert reader.counters()["readahead_requests"] == 0


def test_a_damaged_frame_ahead_is_an_error_only_for_who_reads_it(memory, node):
    pack = make_pack(random_content(8 * MIB, 10), MIB)
    stored = bytearray(pack.stored)
    stored[5 * MIB] ^= 1
    memory.put(layout.pack_key(pack.id), bytes(stored))
    reader = node(memory, pack, readahead=8 * MIB)
    for frame in (0, 1, 2, 3, 4, 6, 7):
        assert read(reader, pack.id, frame * MIB, MIB) == pack.content[frame * MIB :][:MIB]
    with pytest.raises(DamagedError):
        read(reader, pack.id, 5 * MIB, 4096)


class ExpiringBetween(dict):
    """As a TTLCache whose entries expire between being found and being fetched."""

    def __contains__(self, key):
        return True


def test_damage_that_is_forgotten_as_it_is_looked_up_is_no_damage(memory, pack, node):
    reader = node(memory, pack)
    reader._fetcher._requests.damages = ExpiringBetween()
    assert read(reader, pack.id, 0, 3 * FRAME) == pack.content[: 3 * FRAME]


def test_a_fault_of_ours_fails_its_reads_at_once_and_no_later_one(memory, pack, node, monkeypatch):
    reader = node(memory, pack)
    fetcher = reader._fetcher
    with monkeypatch.context() as patch:

        def faulty(pack_id, number):
            if number == 2:
                raise RuntimeError("a mistake")
            return False

        patch.setattr(fetcher._gatherer, "is_local", faulty)
        answer = submit(reader, pack.id, 0, 3 * FRAME)
        assert isinstance(answer.wait(5), UnavailableError)
    assert "a mistake" in str(answer.value)
    eventually(lambda: fetcher._requests.flights == {})
    assert read(reader, pack.id, 0, 3 * FRAME) == pack.content[: 3 * FRAME]
    eventually(lambda: reader.counters()["memory_bytes"] == 0)


def test_an_index_that_cannot_be_read_ends_reading_ahead_and_nothing_else(memory, node, monkeypatch, caplog):
    pack = make_pack(random_content(8 * MIB, 11), MIB).publish(memory)
    reader = node(memory, pack, readahead=8 * MIB)
    table = reader._writer.table
    calls = []

    def failing(pack_id):
        calls.append(pack_id)
        if len(calls) % 2 == 0:  # the reads themselves find it
            raise UnavailableError("too many open files")
        return table(pack_id)

    monkeypatch.setattr(reader._fetcher._ahead, "_writer", type("Writer", (), {"table": staticmethod(failing)}))
    for frame in range(8):
        assert read(reader, pack.id, frame * MIB, MIB) == pack.content[frame * MIB :][:MIB]
    assert len(calls) > 1
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_store_that_asks_us_to_slow_down_is_given_time(memory, pack, node, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.random, "uniform", lambda low, high: pauses.append((low, high)) or 0)
    store = CountdownFailureStore(memory, fail_get={1: UnavailableError("down"), 2: ThrottledError("slow down")})
    assert read(node(store, pack), pack.id, 0, 9) == pack.content[:9]
    assert pauses == [(0, 0.1), (0.1, 0.2)]
