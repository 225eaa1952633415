"""Requests whose answers are read frame by frame: handed out as they come, made good another way when they break."""

import threading

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read, submit
from support.stores import StoreWrapper

from floe.fuse.pack_reader import PackReader
from floe.store import layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import DamagedError, NotFoundError, UnavailableError
from floe.store.objects.memory import MemoryStore

MIB = 1 << 20
LIMIT = 20.0  # seconds


def half_random(size, seed):
    """Content that is stored compressed, to about half."""
    return b"".join(random_content(2048, f"{seed} {number}") + bytes(2048) for number in range(size // 4096))


class Streams(StoreWrapper):
    """Ranges of `inner` that break off after `breaks_at` bytes, flip the byte at `flips`, or wait for `gate` at `waits_at`."""

    def __init__(self, inner, *, breaks_at=None, flips=None, waits_at=None, deaf=False):
        super().__init__(inner)
        self.breaks_at, self.flips, self.waits_at = breaks_at, flips, waits_at
        self.deaf = deaf  # to abort
        self.gate = threading.Event()
        self.waiting = threading.Event()
        self.opened = self.aborted = self.closed = 0
        self.gets = []

    async def get_async(self, key, start, length):
        self.gets.append((start, length))
        return await self.inner.get_async(key, start, length)

    def open_range(self, key, start, length):
        self.opened += 1
        return _Range(self, self.inner.open_range(key, start, length))


class _Range:
    def __init__(self, store, inner):
        self.store, self.inner, self.at, self.ended = store, inner, 0, False

    def readinto(self, buffer):
        store, begin, end = self.store, self.at, self.at + len(buffer)
        if store.waits_at is not None and end > store.waits_at:
            store.waiting.set()
            store.gate.wait(LIMIT)
            if self.ended:
                raise UnavailableError("aborted")
        if store.breaks_at is not None and end > store.breaks_at:
            raise UnavailableError("the answer broke off")
        self.inner.readinto(buffer)
        if store.flips is not None and begin <= store.flips < end:
            buffer[store.flips - begin] ^= 1
        self.at = end

    def abort(self):
        self.store.aborted += 1
        self.ended = True
        if not self.store.deaf:
            self.store.gate.set()

    def close(self):
        self.store.closed += 1


class Vanishing(Streams):
    """The object is gone once its range broke off."""

    async def get_async(self, key, start, length):
        raise NotFoundError(f"{key} is not there")


@pytest.fixture
def node(tmp_path):
    """Makes a reader of `pack` in `store`."""
    made = []

    def make(store, pack, **options):
        writer = CacheWriter(NodeCache(tmp_path / "cache"))
        writer.cache.add_index(pack.id, pack.index.encode())
        made.append((PackReader(store, writer, readahead=0, **options), writer))
        return made[-1][0]

    yield make
    for reader, writer in made:
        reader.close()
        writer.close()


@pytest.fixture(params=["raw", "compressed", "mixed"])
def pack(request):
    kinds = {
        "raw": random_content(8 * MIB, 1),
        "compressed": half_random(8 * MIB, 1),
        "mixed": b"".join((random_content if n % 3 else half_random)(MIB // 2, n) for n in range(16)),
    }
    return make_pack(kinds[request.param], 128 << 10)


def stalled(node, size, at):
    """A read of a pack of `size` bytes whose answer has stopped after `at` bytes: (store, reader, pack, answer)."""
    memory = MemoryStore()
    pack = make_pack(random_content(size, 1), MIB).publish(memory)
    store = Streams(memory, waits_at=at)
    reader = node(store, pack)
    whole = submit(reader, pack.id, 0, size)
    assert store.waiting.wait(LIMIT)
    return store, reader, pack, whole


def test_frames_are_handed_out_before_the_request_has_ended(node):
    store, reader, pack, whole = stalled(node, 8 * MIB, 6 * MIB)
    assert read(reader, pack.id, 5 * MIB, MIB) == pack.content[5 * MIB : 6 * MIB]
    store.gate.set()
    assert whole.wait() == pack.content
    assert (store.opened, store.gets, store.closed) == (1, [], 1)


def test_what_is_counted_is_what_came(node, pack):
    memory = MemoryStore()
    pack.publish(memory)
    reader = node(Streams(memory), pack)
    assert read(reader, pack.id, 0, 8 * MIB) == pack.content
    wait_until(lambda: reader.counters()["store_requests"])  # its answer may be read to the end before it has ended
    counts = reader.counters()
    assert (counts["store_requests"], counts["store_bytes"], counts["store_errors"]) == (1, len(pack.stored), 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_what_breaks_off_comes_another_way(node, pack, share):
    memory = MemoryStore()
    pack.publish(memory)
    store = Streams(memory, breaks_at=int(share * len(pack.stored)))
    reader = node(store, pack)
    assert read(reader, pack.id, 0, 8 * MIB) == pack.content
    ((start, length),) = store.gets
    assert start + length == len(pack.stored)
    assert start <= store.breaks_at  # and nothing twice, but what was read together with the break
    assert reader.counters()["store_bytes"] == len(pack.stored)
    assert store.closed == 1


def test_what_came_before_its_object_vanished_is_not_taken_for_damaged(node):
    pack = make_pack(random_content(4 * MIB, 1), MIB).publish(memory := MemoryStore())
    reader = node(Vanishing(memory, breaks_at=2 * MIB), pack)
    assert isinstance(submit(reader, pack.id, 0, 4 * MIB).wait(), NotFoundError)
    wait_until(lambda: 3 in reader.known_damage.frames[pack.id])
    assert reader.known_damage.frames[pack.id].keys() == {2, 3}
    assert read(reader, pack.id, 0, 2 * MIB) == pack.content[: 2 * MIB]


def test_a_frame_that_arrives_changed_is_fetched_again_alone(node, pack):
    memory = MemoryStore()
    pack.publish(memory)
    store = Streams(memory, flips=len(pack.stored) // 2)
    reader = node(store, pack)
    assert read(reader, pack.id, 0, 8 * MIB) == pack.content
    assert len(store.gets) == 1
    assert store.gets[0][1] <= 128 << 10


def test_damage_at_rest_fails_its_frame_and_no_other(node):
    memory = MemoryStore()
    pack = make_pack(random_content(4 * MIB, 1), MIB).publish(memory)
    damaged = bytearray(pack.stored)
    damaged[MIB + 5] ^= 1
    memory.put(layout.pack_key(pack.id), bytes(damaged))
    reader = node(Streams(memory), pack)
    whole = submit(reader, pack.id, 0, 4 * MIB)
    assert isinstance(whole.wait(), DamagedError)
    assert read(reader, pack.id, 2 * MIB, 2 * MIB) == pack.content[2 * MIB :]


def test_nobody_waits_for_a_request_that_nobody_wants(node):
    store, reader, pack, whole = stalled(node, 4 * MIB, 2 * MIB)
    whole.ticket.cancel()
    whole.wait()
    assert store.gate.wait(LIMIT)  # by abort
    assert store.aborted == 1
    store.waits_at = None
    assert read(reader, pack.id, 0, 4 * MIB) == pack.content
    wait_until(lambda: reader.counters()["memory_bytes"] == 0)


def test_nobody_queues_behind_requests_that_cannot_be_ended_yet(node):
    """As those that are connecting: a thread each, until that fails."""
    memory = MemoryStore()
    pack = make_pack(random_content(64 * MIB, 1), MIB).publish(memory)
    store = Streams(memory, waits_at=0, deaf=True)
    reader = node(store, pack)
    answers = [submit(reader, pack.id, number * MIB, MIB) for number in range(0, 64, 2)]  # not adjacent
    wait_until(lambda: store.opened == 32)
    for answer in answers:
        answer.ticket.cancel()
        answer.wait()
    assert read(reader, pack.id, 63 * MIB, MIB) == pack.content[63 * MIB :]
    assert len(store.gets) == 1
    store.gate.set()


def test_closing_ends_what_is_being_read(node):
    store, reader, _, whole = stalled(node, 4 * MIB, 2 * MIB)
    reader.close()
    whole.wait()
    assert store.aborted == 1
