"""Reads that go around a cache disk slower than the store, and come back to it when the store does not answer."""

import contextlib
import itertools
import os
import threading
import time

import pytest
from support.mounts import until
from support.packs import make_pack, random_content
from support.reading import read, submit
from support.stores import (
    CountdownFailureStore,
    LastByteFlipStore,
    RecordingStore,
    SilentStore,
    SlowStore,
    UnreachableStore,
)

from floe.fuse.pack_reader import PackReader
from floe.store.cache import NodeCache, bypass, cached_pack, open_writer, packfiles
from floe.store.errors import AccessDeniedError, DeadlineError, NotFoundError
from floe.store.objects.memory import MemoryStore
from floe.store.policy import ALWAYS, AUTO, NEVER

MIB = 1 << 20
FRAME = 128 << 10


class SlowDisk:
    """In the place of the cache's: nothing is in the page cache, and each read takes `delay` seconds. Counts the reads."""

    def __init__(self, monkeypatch, delay):
        self.delay, self.reads, self.in_memory = delay, 0, False
        self._lock = threading.Lock()
        real = os.preadv

        def preadv(fd, buffers, offset, flags=0):
            if not self.in_memory:
                if flags & os.RWF_NOWAIT:
                    raise BlockingIOError
                with self._lock:
                    self.reads += 1
                time.sleep(self.delay)
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        for module in (packfiles, cached_pack):
            monkeypatch.setattr(module, "is_in_memory", lambda *_: self.in_memory)


@pytest.fixture
def memory():
    return MemoryStore()


@pytest.fixture
def pack(memory):
    return make_pack(random_content(8 * MIB, 1), FRAME).publish(memory)


@pytest.fixture
def warm(tmp_path, memory, pack, monkeypatch):
    """Makes readers of a cache that holds the pack, on a disk of its own slowness; closes them."""
    with contextlib.ExitStack() as stack:

        def make(store, mode, *, delay=0.02, **options):
            writer = stack.enter_context(contextlib.closing(open_writer(NodeCache(tmp_path / "cache"), bypass=mode)))
            writer.cache.add_index(pack.id, pack.index.encode())
            filling = PackReader(memory, writer, readahead=0)
            assert read(filling, pack.id, 0, 8 * MIB) == pack.content
            until(writer.pack(pack.id).bits.is_full)
            filling.close()
            disk = SlowDisk(monkeypatch, delay)
            options = {"readahead": 0, "deadline": 20.0, **options}
            return stack.enter_context(contextlib.closing(PackReader(store, writer, **options))), writer, disk

        yield make


def read_frames(reader, pack, numbers):
    for number in numbers:
        assert read(reader, pack.id, number * FRAME, FRAME) == pack.content[number * FRAME : (number + 1) * FRAME]


def test_a_warm_cache_on_a_slow_disk_is_gone_around(warm, memory, pack):
    store = RecordingStore(memory)
    reader, writer, disk = warm(store, AUTO, delay=0.1)  # far more than a miss takes, also on a busy machine
    numbers = itertools.cycle(range(0, 64, 2))
    until(lambda: (read_frames(reader, pack, [next(numbers)]), writer.bypass.slow)[1], 60)
    (status,) = writer.disks()
    assert status["bypass"]["bypassed"]
    assert status["bypass"]["miss_seconds"][str(FRAME)] < 0.1
    disk_before, store_before = disk.reads, store.bytes_read
    read_frames(reader, pack, range(1, 64, 2))
    assert disk.reads - disk_before <= 2 * bypass._LEAST  # a probe at most
    assert store.bytes_read > store_before
    assert reader.counters()["around_reads"] > 0


def test_a_disk_that_never_is_gone_around_is_said_to_be_slow(warm, memory, pack, caplog):
    store = RecordingStore(memory)
    reader, writer, _ = warm(store, NEVER)
    for _ in range(8):
        writer.missed(FRAME, 0.001)
    until(lambda: (read_frames(reader, pack, range(16)), writer.bypass.slow)[1])
    assert "A HIT COSTS MORE THAN A MISS" in caplog.text
    assert store.bytes_read == 0


def test_what_misses_cost_is_measured_by_reads_that_asked_for_all_they_wait_for(tmp_path, memory):
    pack = make_pack(random_content(16 * MIB, 2), MIB).publish(memory)
    writer = open_writer(NodeCache(tmp_path / "cache"), bypass=AUTO)
    writer.cache.add_index(pack.id, pack.index.encode())
    reader = PackReader(SlowStore(memory, delay=0.05), writer, readahead=0)
    first = submit(reader, pack.id, 0, 4096)
    for number in range(8):
        assert read(reader, pack.id, number * 2 * MIB + 5, 4096) == pack.content[number * 2 * MIB + 5 :][:4096]
    first.wait()
    reader.close()
    writer.close()
    assert writer.bypass.misses.count in (8, 9)  # the first two were one request
    (seconds,) = writer.bypass.misses.medians().values()
    assert seconds >= 0.05


def test_what_is_in_the_page_cache_is_read_there(warm, memory, pack):
    store = RecordingStore(memory)
    reader, _, disk = warm(store, ALWAYS)
    disk.in_memory = True
    read_frames(reader, pack, range(64))
    assert store.bytes_read == 0
    disk.in_memory = False
    read_frames(reader, pack, range(8))
    assert (store.bytes_read, disk.reads) == (sum(pack.index.frames[n].stored for n in range(8)), 0)


def test_small_reads_of_a_frame_ask_the_store_once(warm, memory, pack):
    store = RecordingStore(memory)
    reader, _, disk = warm(store, ALWAYS)
    for offset in range(0, FRAME, 4096):
        assert read(reader, pack.id, offset, 4096) == pack.content[offset : offset + 4096]
        until(lambda: reader.counters()["memory_bytes"] == 0)  # written behind, and so out of the way
    assert len(store.ops("get")) == 1
    assert disk.reads == 0


def test_a_sequential_reader_has_the_store_read_ahead(warm, memory, pack):
    store = RecordingStore(memory)
    reader, _, disk = warm(store, ALWAYS, readahead=4 * MIB)
    read_frames(reader, pack, range(64))
    assert reader.counters()["readahead_bytes"] > 4 * MIB
    assert store.bytes_read == len(pack.stored)  # nothing twice
    assert disk.reads == 0


@pytest.mark.parametrize(("outage", "mode"), [(UnreachableStore, AUTO), (SilentStore, ALWAYS)])
def test_while_the_store_does_not_answer_the_disk_is_read(warm, memory, pack, outage, mode):
    down = outage(memory)
    reader, writer, disk = warm(down, mode)
    if mode == AUTO:
        for _ in range(8):
            writer.bypass.hit(FRAME, 0.04)
            writer.missed(FRAME, 0.01)
        time.sleep(2 * bypass._LOOK)
        writer.missed(FRAME, 0.01)
        assert writer.bypass.diverts
    began = time.monotonic()
    read_frames(reader, pack, range(32))
    assert time.monotonic() - began < 15  # far below 32 deadlines
    assert disk.reads >= 32
    assert reader.counters()["failed_reads"] == 0
    assert reader.counters()["around_returned"] >= 1
    if isinstance(down, SilentStore):
        down.release()


@pytest.mark.parametrize("error", [NotFoundError, AccessDeniedError])
def test_what_the_store_refuses_is_read_from_the_disk(warm, memory, pack, error):
    refusing = CountdownFailureStore(memory, fail_get=dict.fromkeys(range(1, 40), error("no")))
    reader, _, disk = warm(refusing, ALWAYS)
    read_frames(reader, pack, range(8))
    assert disk.reads == 8
    assert read(reader, pack.id, 100, 3 * FRAME) == pack.content[100 : 100 + 3 * FRAME]


def test_what_is_damaged_in_the_store_is_read_from_the_disk(warm, memory, pack):
    reader, _, disk = warm(LastByteFlipStore(memory), ALWAYS)
    for _ in range(2):
        read_frames(reader, pack, range(3))
    assert disk.reads == 6
    assert reader.counters()["failed_reads"] == 0


def test_what_neither_the_store_nor_the_disk_gives_fails_in_time(warm, memory, pack, monkeypatch):
    reader, _, _ = warm(UnreachableStore(memory), ALWAYS, deadline=1.5)

    def bad(*_):
        raise OSError(5, "bad")

    monkeypatch.setattr(os, "preadv", bad)
    with pytest.raises(DeadlineError):
        read(reader, pack.id, 0, FRAME)


def test_a_late_answer_and_the_disks_do_not_meet_twice(warm, memory, pack):
    gate = threading.Event()
    reader, _, disk = warm(SlowStore(memory, gate=gate), ALWAYS, delay=0.0)
    answers = [submit(reader, pack.id, n * FRAME + 7, 2 * FRAME) for n in range(0, 32, 2)]
    until(lambda: disk.reads >= 16)
    gate.set()
    for n, answer in zip(range(0, 32, 2), answers, strict=True):
        assert answer.wait() == pack.content[n * FRAME + 7 : (n + 2) * FRAME + 7]
    until(lambda: reader.counters()["memory_bytes"] == 0)
