"""The cache against a model of it: whatever happens, what it says is there reads back right, and bounds hold."""

import contextlib
import errno
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.mounts import until
from support.packs import make_pack, random_content

from floe.store.cache import CacheWriter, NodeCache, cached_pack, durable, ownership
from floe.store.frames import VerifiedFrame

MIB = 1 << 20
FRAME = 256 << 10
SIZE = 10 * MIB
PACKS = [make_pack(random_content(size, seed), FRAME) for seed, size in enumerate((6 * MIB, 5 * MIB + 4096, MIB))]
FRAMES = {
    (pack.id, number): VerifiedFrame(pack.content[number * FRAME :][:FRAME], entry.digest)
    for pack in PACKS
    for number, entry in enumerate(pack.index.frames)
}
BOOTS = [f"{number:036d}" for number in range(3)]

packs = st.sampled_from(PACKS)


class Cache(RuleBasedStateMachine):
    """`damaged`: (pack, frame) whose data was spoiled; `pinned`: pack -> frames that were present since the pin."""

    @initialize()
    def begin(self):
        # In memory where that exists: syncs are many, and what the disk does is not the question here.
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="floe-cache-", dir=shared if shared.is_dir() else None))
        self.cache = NodeCache(self.folder, size=SIZE)
        for pack in PACKS:
            self.cache.add_index(pack.id, pack.index.encode())
        self.boot = 0
        self.writer = CacheWriter(self.cache, boot_id=BOOTS[0])
        self.damaged = set()
        self.pinned = {}
        self.share = SIZE, []

    def teardown(self):
        if hasattr(self, "folder"):
            self.writer.close()
            shutil.rmtree(self.folder)

    def frames(self, pack):
        return range(len(pack.index.frames))

    def present(self, pack):
        return set(self.writer.pack(pack.id).bits.present())

    def some(self, pack, start, count):
        """Adjacent frames of the pack, at least one."""
        frames = self.frames(pack)
        start %= len(frames)
        return frames[start : start + count]

    def shared(self):
        """Bytes that the packs of the share hold together."""
        return sum(self.writer.pack(pack.id).bits.held() for pack in self.share[1])

    @rule(pack=packs, start=st.integers(0, 23), count=st.integers(1, 24), unread=st.booleans(), direct=st.booleans())
    def put(self, pack, start, count, unread, direct):
        numbers = self.some(pack, start, count)
        before = {number for number in numbers if self.writer.has(pack.id, number)}
        run = [FRAMES[pack.id, number] for number in numbers]
        kept = self.writer.put_run(pack.id, numbers[0], run, direct=direct, unread=unread)
        bound = pack in self.share[1]
        if not (
            kept or unread or self.pinned or bound
        ):  # a pack that is being completed does not go, and nothing else stays
            kept = until(lambda: self.writer.put_run(pack.id, numbers[0], run, direct=direct))
        self.writer._evictor._idle_until = 0
        after = {number for number in numbers if self.writer.has(pack.id, number)}
        if kept:
            assert after == set(numbers)
            self.damaged -= {(pack.id, number) for number in numbers}
            assert before == after or not bound or self.shared() <= self.share[0]
        else:
            assert after <= before  # all or none, and room may have been made at their cost

    @rule(pack=packs, start=st.integers(0, 23), count=st.integers(1, 24), good=st.integers(0, 6))
    def put_on_a_failing_disk(self, pack, start, count, good):
        """Only so many more writes reach it."""
        numbers = self.some(pack, start, count)
        left = iter(range(good))

        def write(fd, data, offset):
            if next(left, None) is None:
                raise OSError(errno.EIO, "the disk fails")
            durable.write_all(fd, data, offset)

        with mock.patch.object(cached_pack, "write_all", write):
            kept = self.writer.put_run(pack.id, numbers[0], [FRAMES[pack.id, number] for number in numbers])
        self.writer._evictor._idle_until = 0
        if kept:
            self.damaged -= {(pack.id, number) for number in numbers}
        for one in PACKS:  # what could not be written down is not there: not what was damaged either
            self.damaged -= {(one.id, n) for n in self.frames(one)} - {(one.id, n) for n in self.present(one)}

    @rule(chosen=st.sets(st.integers(0, len(PACKS) - 1)), size=st.integers(1, SIZE))
    def set_share(self, chosen, size):
        self.share = size, [PACKS[number] for number in chosen]
        self.writer.shares.set("m", size, [pack.id for pack in self.share[1]])

    @rule(pack=packs, start=st.integers(0, 23), count=st.integers(1, 24))
    def discard(self, pack, start, count):
        """As for what turned out to be damaged, or is to make room: pins hold."""
        going = list(self.some(pack, start, count))
        had = self.present(pack) & set(going)
        gone = self.writer.discard(pack.id, going)
        assert gone == (bool(had) and pack.id not in self.pinned)
        if gone:
            assert not self.present(pack) & set(going)
            self.damaged -= {(pack.id, number) for number in going}

    @rule(pack=packs, number=st.integers(0, 23))
    def recheck(self, pack, number):
        number %= len(self.frames(pack))
        suspect = self.writer.pack(pack.id).bits.is_suspect(number)
        frame = self.writer.recheck(pack.id, number)
        assert (frame is not None) == (suspect and (pack.id, number) not in self.damaged)
        if frame is not None:
            assert bytes(frame.content) == pack.content[number * FRAME :][:FRAME]
        elif suspect:
            assert number not in self.present(pack)
            self.damaged.discard((pack.id, number))
            self.pinned.get(pack.id, set()).discard(number)

    @rule(pack=packs)
    def pin(self, pack):
        self.cache.pin(pack.id, "x")
        self.pinned[pack.id] = self.pinned.get(pack.id, set()) | self.present(pack)

    @rule(pack=packs)
    def unpin(self, pack):
        self.cache.unpin(pack.id, "x")
        self.pinned.pop(pack.id, None)

    @rule()
    def stop_and_start(self):
        self.writer.close()
        self.start()

    def start(self):
        self.writer = CacheWriter(self.cache, boot_id=BOOTS[self.boot])
        self.writer.shares.set("m", self.share[0], [pack.id for pack in self.share[1]])

    @rule()
    def kill_and_start(self):
        self.kill()
        self.start()

    @rule(seed=st.integers(0, 1 << 32))
    def power_loss(self, seed):
        """A kill, and unsynced data lost: packs that are not complete may have any frame spoiled."""
        choose = random.Random(seed)  # what was synced by now is a matter of time, and what is drawn must not be
        self.kill()
        for pack in PACKS:
            if self.cache.is_complete(pack.id) or choose.random() < 0.5:
                continue
            number = choose.choice(self.frames(pack))
            if self.writer.pack(pack.id).changed or self.writer.pack(pack.id).bits.is_suspect(number):
                with self.cache.data_path(pack.id).open("r+b") as file:
                    file.seek(number * FRAME)
                    file.write(b"spoiled!")
                self.damaged.add((pack.id, number))
        self.boot = (self.boot + 1) % len(BOOTS)
        self.start()
        for pack in PACKS:
            self.damaged -= {(pack.id, n) for n in self.frames(pack)} - {(pack.id, n) for n in self.present(pack)}

    def kill(self):
        self.writer._finishing.put(None)
        self.writer._finisher.join()
        for pack in self.writer.packs.values():
            pack.files = None
        ownership.release(self.writer._lock_fd)

    @invariant()
    def what_it_has_is_right(self):
        if not hasattr(self, "folder"):
            return
        held = 0
        for pack in PACKS:
            present = self.present(pack)
            held += sum(map(pack.index.content_length, present))
            assert self.pinned.get(pack.id, set()) <= present
            cached = self.writer.pack(pack.id)
            for number in self.frames(pack):
                buffer = bytearray(pack.index.content_length(number))
                trusted = self.writer.has(pack.id, number)
                assert cached.read_into(number * FRAME, memoryview(buffer)) == trusted
                assert not trusted or buffer == FRAMES[pack.id, number].content
            if self.cache.is_complete(pack.id):
                assert self.cache.data_path(pack.id).read_bytes() == pack.content
            if not present:
                with contextlib.suppress(FileNotFoundError):
                    assert self.cache.data_path(pack.id).stat().st_size == pack.index.content_size
        assert self.writer.counters()["held_bytes"] == held <= SIZE


Cache.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCache = Cache.TestCase
