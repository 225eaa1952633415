"""What the node cache writes in which order, and what it makes of a write that fails."""

import contextlib
import errno
import os
from itertools import repeat
from pathlib import Path

import pytest
from support.packs import make_pack, random_content
from support.reading import read
from test_cache_faults import add, allocated, crash, eventually, frame_of, in_cache, opened, put_all, trusted

from floe.fuse.pack_reader import PackReader
from floe.store.cache import CacheWriter, NodeCache, cached_pack
from floe.store.errors import UnavailableError
from floe.store.objects.memory import MemoryStore

MIB = 1 << 20
FRAME = 128 << 10
OTHER_BOOT = "00000000-0000-0000-0000-00000000000b"


class Disk:
    """Keeps what is asked of the disk, as (operation, file name); `fail` maps such pairs to whether they fail, each time."""

    def __init__(self, monkeypatch):
        self.done = []
        self.fail = {}
        for name in ("pwrite", "pwritev", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._watched(name.removesuffix("v"), getattr(os, name)))
        monkeypatch.setattr(os, "open", self._opening(os.open))

    def _watched(self, name, call):
        def watched(fd, *arguments):
            self._note(name, str(Path(f"/proc/self/fd/{fd}").readlink()))
            return call(fd, *arguments)

        return watched

    def _opening(self, call):
        def opening(path, flags, *arguments, **options):
            if flags & os.O_CREAT and not Path(path).exists():
                self._note("create", os.fsdecode(path))
            return call(path, flags, *arguments, **options)

        return opening

    def _note(self, operation, path):
        entry = (operation, Path(path).name)
        self.done.append(entry)
        if next(self.fail.get(entry, iter(())), False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def of(self, *names):
        return [entry for entry in self.done if entry[1] in names]


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def pack(cache):
    pack = make_pack(random_content(2 * MIB, 1), FRAME)
    add(cache, pack)
    return pack


def bitmap_on_disk(cache, pack):
    return (cache.folder(pack.id) / "bitmap").read_bytes()


def is_clean(cache, pack):
    return bitmap_on_disk(cache, pack)[10] == 1


# order


def test_clean_is_said_only_of_what_is_on_disk(cache, pack, disk):
    writer = CacheWriter(cache)
    writer.put(pack.id, 3, frame_of(pack, 3))
    disk.done.clear()
    writer.close()
    # The bits of all frames before the header: it may reach the disk without the other pages of its file.
    assert disk.of("data", "bitmap") == [
        ("fdatasync", "data"),
        ("fdatasync", "bitmap"),
        ("pwrite", "bitmap"),
        ("fdatasync", "bitmap"),
    ]
    assert is_clean(cache, pack)


def test_clean_is_taken_back_on_disk_before_anything_changes(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 3, frame_of(pack, 3))
    writer.close()
    writer = opened(stack, cache)
    disk.done.clear()
    writer.put(pack.id, 4, frame_of(pack, 4))
    writer.put(pack.id, 5, frame_of(pack, 5))
    assert disk.of("data", "bitmap")[:3] == [("pwrite", "bitmap"), ("fdatasync", "bitmap"), ("pwrite", "data")]
    assert disk.done.count(("fdatasync", "bitmap")) == 1
    assert not is_clean(cache, pack)


def test_complete_is_said_only_after_all_data_is_on_disk_and_is_durable(cache, pack, disk, stack):
    writer = opened(stack, cache)
    put_all(writer, pack)
    eventually(lambda: writer.pack(pack.id).complete)
    last_write = max(at for at, entry in enumerate(disk.done) if entry == ("pwrite", "data"))
    said = [entry for entry in disk.done[last_write:] if entry[0] in ("fsync", "create")]
    assert [entry for entry in said if entry[1] in ("data", "complete", pack.id)] == [
        ("fsync", "data"),
        ("create", "complete"),
        ("fsync", "complete"),
        ("fsync", pack.id),
    ]


def test_complete_is_gone_from_the_disk_before_any_data_is(tmp_path, disk, stack, monkeypatch):
    cache = NodeCache(tmp_path / "cache", size=2 * MIB)
    first, second = (make_pack(random_content(2 * MIB, seed), FRAME) for seed in (1, 2))
    add(cache, first, second)
    writer = opened(stack, cache)
    put_all(writer, first)
    eventually(lambda: writer.pack(first.id).complete)
    punch = cached_pack.punch

    def punching(*arguments):
        assert not (cache.folder(first.id) / "complete").exists()
        disk.done.append(("punch", "data"))
        return punch(*arguments)

    monkeypatch.setattr(cached_pack, "punch", punching)
    disk.done.clear()
    eventually(lambda: writer.put(second.id, 0, frame_of(second, 0)))
    assert disk.done.index(("fsync", first.id)) < disk.done.index(("pwrite", "bitmap"))
    assert disk.done.index(("pwrite", "bitmap")) < disk.done.index(("punch", "data"))


def test_a_pin_is_durable_when_it_is_there_and_when_it_is_gone(cache, pack, disk):
    disk.done.clear()
    cache.pin(pack.id, "tree")
    assert disk.of("tree", "pins", pack.id) == [("create", "tree"), ("fsync", "pins"), ("fsync", pack.id)]
    disk.done.clear()
    cache.unpin(pack.id, "tree")
    assert disk.of("pins") == [("fsync", "pins")]


# writes that fail


def test_a_first_change_that_fails_is_tried_with_its_sync(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 3, frame_of(pack, 3))
    writer.close()
    writer = opened(stack, cache)
    disk.fail["pwrite", "bitmap"] = iter([True])
    disk.done.clear()
    assert writer.put(pack.id, 4, frame_of(pack, 4))
    assert disk.of("data", "bitmap")[:3] == [("pwrite", "bitmap"), ("pwrite", "bitmap"), ("fdatasync", "bitmap")]


def test_who_follows_a_writer_killed_before_its_sync_takes_clean_back_too(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 3, frame_of(pack, 3))
    writer.close()
    writer = CacheWriter(cache)
    disk.fail["fdatasync", "bitmap"] = repeat(True)
    assert not writer.put(pack.id, 4, frame_of(pack, 4))
    crash(writer)
    assert not is_clean(cache, pack)  # as the page cache has it; the disk may not
    disk.fail.clear()
    writer = opened(stack, cache)
    disk.done.clear()
    writer.put(pack.id, 4, frame_of(pack, 4))
    assert disk.of("data", "bitmap")[:3] == [("pwrite", "bitmap"), ("fdatasync", "bitmap"), ("pwrite", "data")]


@pytest.mark.parametrize("header_written", [False, True])
def test_after_a_sync_that_failed_no_change_happens_under_a_clean_header(cache, pack, disk, stack, header_written):
    writer = opened(stack, cache)
    writer.put(pack.id, 3, frame_of(pack, 3))
    disk.fail["fdatasync", "bitmap"] = iter([False] * header_written + [True])
    with pytest.raises(OSError, match="Input/output"):
        writer.pack(pack.id).sync()
    assert is_clean(cache, pack) == header_written
    disk.done.clear()
    writer.put(pack.id, 4, frame_of(pack, 4))
    assert not is_clean(cache, pack)
    took_back = [("pwrite", "bitmap"), ("fdatasync", "bitmap")] * header_written
    assert disk.of("data", "bitmap") == [*took_back, ("pwrite", "data"), ("pwrite", "bitmap")]


def held(writer):
    return sum(pack.bits.content_length(number) for pack in writer.packs.values() for number in pack.bits.present())


def test_bits_that_cannot_be_written_are_not_counted(tmp_path, disk, stack):
    cache = NodeCache(tmp_path / "cache", size=3 * MIB)
    pack = make_pack(random_content(6 * MIB, 1), MIB)
    add(cache, pack)
    writer = opened(stack, cache)
    assert writer.put(pack.id, 0, frame_of(pack, 0))
    disk.fail["pwrite", "bitmap"] = repeat(True)
    for number in range(1, 6):
        assert not writer.put(pack.id, number, frame_of(pack, number))
        writer._evictor._idle_until = 0
    assert trusted(writer, pack) == [0]
    assert writer.counters()["held_bytes"] == held(writer) == MIB
    disk.fail.clear()
    assert writer.put(pack.id, 1, frame_of(pack, 1))
    assert writer.counters()["held_bytes"] == held(writer) == 2 * MIB


def test_what_cannot_be_cleared_on_disk_is_not_taken_away(tmp_path, disk, stack):
    cache = NodeCache(tmp_path / "cache", size=4 * MIB)
    pack = make_pack(random_content(8 * MIB, 1), MIB)
    add(cache, pack)
    writer = CacheWriter(cache)
    for number in range(4):
        assert writer.put(pack.id, number, frame_of(pack, number))
    disk.fail["pwrite", "bitmap"] = repeat(True)
    assert not writer.put(pack.id, 5, frame_of(pack, 5))
    assert writer.counters()["held_bytes"] == held(writer) == 4 * MIB
    assert all(in_cache(writer, pack, number) == pack.content[number * MIB :][:MIB] for number in range(4))
    crash(writer)  # whoever comes next believes the bits that are on disk
    disk.fail.clear()
    writer = opened(stack, cache)
    assert trusted(writer, pack) == [0, 1, 2, 3]
    assert all(in_cache(writer, pack, number) == pack.content[number * MIB :][:MIB] for number in range(4))
    assert writer.put(pack.id, 5, frame_of(pack, 5))
    assert writer.counters()["held_bytes"] == held(writer)


def test_space_that_cannot_be_given_back_does_not_keep_other_space(tmp_path, stack, monkeypatch):
    cache = NodeCache(tmp_path / "cache", size=8 * MIB)
    pack = make_pack(random_content(12 * MIB, 1), MIB)
    add(cache, pack)
    writer = opened(stack, cache)
    for number in (0, 2, 3, *range(4, 9)):
        assert writer.put(pack.id, number, frame_of(pack, number))
    punch, failing = cached_pack.punch, [1]

    def punching(*arguments):
        if failing:
            failing.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return punch(*arguments)

    monkeypatch.setattr(cached_pack, "punch", punching)
    assert writer.evict(2 * MIB) >= 2 * MIB
    assert not failing
    assert allocated(cache, pack) <= held(writer) + MIB  # frame 0's, which nobody could give back
    assert writer.counters()["held_bytes"] == held(writer)


def test_a_damaged_frame_is_forgotten_though_that_cannot_be_written(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    for number in (1, 2):
        writer.put(pack.id, number, frame_of(pack, number))
    disk.fail["pwrite", "bitmap"] = iter([True])
    writer.pack(pack.id).forget(1)
    assert trusted(writer, pack) == [2]
    assert writer.counters()["held_bytes"] == FRAME
    writer.put(pack.id, 3, frame_of(pack, 3))  # the next change writes all
    crash(writer)
    assert trusted(opened(stack, cache), pack) == [2, 3]


def test_frames_are_not_trusted_by_anyone_when_the_disk_failed_to_keep_them(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 1, frame_of(pack, 1))
    disk.fail["pwrite", "bitmap"] = repeat(True)
    writer.pack(pack.id).distrust(writer._boot_id)
    assert trusted(writer, pack) == []
    disk.fail.clear()
    crash(writer)
    assert trusted(opened(stack, cache), pack) == []


def test_what_the_disk_did_not_take_is_fetched_again_whatever_memory_holds_of_it(cache, pack, disk, stack):
    """After a failed write-back the kernel has the pages as clean: hashing them says nothing of the disk."""
    writer = opened(stack, cache)
    disk.fail["fdatasync", "data"] = iter([True])
    put_all(writer, pack)
    eventually(lambda: writer.counters()["write_errors"] == 1 and writer.counters()["held_bytes"] == 0)
    assert writer.pack(pack.id).bits.present() == []
    assert not cache.is_complete(pack.id)
    disk.done.clear()
    put_all(writer, pack)
    eventually(lambda: writer.pack(pack.id).complete)
    assert ("pwrite", "data") in disk.done


def test_what_the_disk_did_not_take_at_the_end_is_trusted_by_no_later_writer(cache, pack, disk, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 1, frame_of(pack, 1))
    disk.fail["fdatasync", "data"] = iter([True])
    writer.close()
    assert trusted(opened(stack, cache), pack) == []


def test_a_data_file_that_was_cut_is_believed_by_no_later_writer_either(cache, pack, stack):
    writer = CacheWriter(cache)
    writer.put(pack.id, 1, frame_of(pack, 1))
    crash(writer)
    os.truncate(cache.data_path(pack.id), MIB)
    crash(CacheWriter(cache))  # finds it so, makes it whole again, and changes nothing else
    assert trusted(opened(stack, cache), pack) == []


def test_data_that_was_removed_takes_what_was_said_of_it_along(cache, pack, stack):
    writer = CacheWriter(cache)
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    crash(writer)
    cache.data_path(pack.id).unlink()
    cache.data_path(pack.id)  # as the next mount of its tree does
    assert not cache.is_complete(pack.id)
    assert trusted(opened(stack, cache), pack) == []


# no descriptors


@pytest.fixture
def no_descriptors(monkeypatch):
    """Once set to 1, listing and reading files fail as in a process that has too many open."""
    state = [0]

    def failing(call):
        def run(*arguments, **options):
            if state[0]:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return call(*arguments, **options)

        return run

    monkeypatch.setattr(os, "listdir", failing(os.listdir))
    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
    yield state
    state[0] = 0


def test_without_descriptors_frames_are_not_kept_and_no_read_fails(tmp_path, stack, no_descriptors):
    cache = NodeCache(tmp_path / "cache", size=2 * MIB)
    memory = MemoryStore()
    first, second = (make_pack(random_content(2 * MIB, seed), FRAME).publish(memory) for seed in (1, 2))
    add(cache, first, second)
    writer = opened(stack, cache)
    reader = stack.enter_context(contextlib.closing(PackReader(memory, writer, readahead=0)))
    put_all(writer, first)
    eventually(lambda: cache.is_complete(first.id))
    assert writer.pack(second.id)
    assert writer.table(second.id)
    no_descriptors[0] = 1
    assert not writer.put(second.id, 1, frame_of(second, 1))  # who pins what cannot be told, so nothing is evicted
    writer._tables._tables.clear()
    assert not writer.put(second.id, 2, frame_of(second, 2))
    with pytest.raises(UnavailableError, match="Too many open files"):
        writer.table(second.id)
    no_descriptors[0] = 0
    writer._evictor._idle_until = 0
    assert read(reader, second.id, FRAME, FRAME) == second.content[FRAME : 2 * FRAME]


def test_a_frame_is_not_forgotten_for_want_of_a_descriptor(cache, pack, stack, monkeypatch):
    memory = MemoryStore()
    pack.publish(memory)
    writer = opened(stack, cache)
    writer.put(pack.id, 1, frame_of(pack, 1))
    writer.pack(pack.id).files = None

    def fail(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(cached_pack, "Files", fail)
        assert in_cache(writer, pack, 1) is None
    assert in_cache(writer, pack, 1) == pack.content[FRAME : 2 * FRAME]
