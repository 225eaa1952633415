"""The node cache under kills, crashes, full and failing disks, and eviction under readers and pins."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.packs import make_pack, random_content
from support.reading import read
from support.stores import RecordingStore

from floe.fuse.pack_reader import PackReader
from floe.store.blocks import Blocks
from floe.store.cache import CacheWriter, NodeCache, cached_pack, ownership, packfiles
from floe.store.cache.bitmap import Bitmap
from floe.store.errors import BusyError, DamagedError, NotFoundError
from floe.store.frames import VerifiedFrame
from floe.store.objects.memory import MemoryStore

MIB = 1 << 20
FRAME = 128 << 10
OTHER_BOOT = "00000000-0000-0000-0000-00000000000b"
PROCESS = Path(__file__).parent.parent / "support" / "cache_writer_process.py"


def eventually(condition, timeout=10.0):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.002)


def add(cache, *packs):
    for pack in packs:
        cache.add_index(pack.id, pack.index.encode())


def frame_of(pack, number):
    start = number * pack.index.frame_size
    return VerifiedFrame(pack.content[start : start + pack.index.frame_size], pack.index.frames[number].digest)


def put_all(writer, pack):
    for number in range(len(pack.index.frames)):
        assert writer.put(pack.id, number, frame_of(pack, number))


def opened(stack, cache, **options):
    return stack.enter_context(contextlib.closing(CacheWriter(cache, **options)))


def crash(writer):
    """Leave everything as a killed process would, and only let the lock go."""
    writer._finishing.put(None)
    writer._finisher.join()
    for pack in writer.packs.values():
        pack.files = None
    ownership.release(writer._lock_fd)


def trusted(writer, pack):
    return [n for n in range(len(pack.index.frames)) if writer.has(pack.id, n)]


def in_cache(writer, pack, number):
    size = pack.index.frame_size
    buffer = bytearray(pack.index.content_length(number))
    if not writer.pack(pack.id).read_into(number * size, memoryview(buffer)):
        return None
    return bytes(buffer)


def allocated(cache, pack):
    return cache.data_path(pack.id).stat().st_blocks * 512


@pytest.mark.parametrize("kill_at", [3, 17, 100])
def test_a_writer_killed_at_work_leaves_only_true_bits(cache, stack, tmp_path, kill_at):
    pack = make_pack(random_content(16 * MIB, 1), FRAME)
    add(cache, pack)
    (tmp_path / "content").write_bytes(pack.content)
    command = [sys.executable, str(PROCESS), str(cache.root), str(tmp_path / "content"), pack.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if int(line) == kill_at:
                break
        with pytest.raises(BusyError, match=str(process.pid)):
            CacheWriter(cache)
        process.kill()
    writer = opened(stack, cache, wait=5)
    kept = trusted(writer, pack)
    assert kept[: kill_at + 1] == list(range(kill_at + 1))
    for number in kept:
        assert in_cache(writer, pack, number) == pack.content[number * FRAME :][:FRAME]
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    assert cache.data_path(pack.id).read_bytes() == pack.content


def test_after_an_unclean_stop_every_frame_is_hashed_again(cache, stack):
    memory = MemoryStore()
    pack = make_pack(random_content(2 * MIB, 2), FRAME).publish(memory)
    add(cache, pack)
    writer = CacheWriter(cache)
    for number in range(8):
        writer.put(pack.id, number, frame_of(pack, number))
    crash(writer)
    with cache.data_path(pack.id).open("r+b") as file:  # the page that never reached the disk
        file.seek(3 * FRAME + 77)
        file.write(b"\0")
    # A second writer of the new boot dies too: what it did not hash stays suspect.
    crash(CacheWriter(cache, boot_id=OTHER_BOOT))
    writer = opened(stack, cache, boot_id=OTHER_BOOT)
    assert trusted(writer, pack) == []
    assert writer.counters()["held_bytes"] == 8 * FRAME
    store = RecordingStore(memory)
    reader = stack.enter_context(contextlib.closing(PackReader(store, writer, readahead=0)))
    for number in range(8):
        assert read(reader, pack.id, number * FRAME, FRAME) == pack.content[number * FRAME :][:FRAME]
    assert [r.start // FRAME for r in store.requests] == [3]
    assert reader.counters()["kept_damaged_frames"] == 1
    eventually(lambda: trusted(writer, pack) == list(range(8)))


def test_a_clean_stop_is_trusted_by_the_next_boot_until_something_changes(cache, stack):
    pack = make_pack(random_content(2 * MIB, 3), FRAME)
    add(cache, pack)
    writer = CacheWriter(cache)
    writer.put(pack.id, 1, frame_of(pack, 1))
    writer.close()
    writer = CacheWriter(cache, boot_id=OTHER_BOOT)
    assert trusted(writer, pack) == [1]
    writer.put(pack.id, 2, frame_of(pack, 2))
    crash(writer)
    writer = opened(stack, cache)  # a third boot, as far as the file can tell
    assert trusted(writer, pack) == []
    assert bytes(writer.recheck(pack.id, 1).content) == pack.content[FRAME : 2 * FRAME]
    assert trusted(writer, pack) == [1]


def test_a_complete_pack_is_trusted_whatever_its_bitmap_says(cache, stack):
    pack = make_pack(random_content(MIB, 4), FRAME)
    add(cache, pack)
    writer = CacheWriter(cache)
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    crash(writer)
    (cache.folder(pack.id) / "bitmap").write_bytes(b"rubbish")
    writer = opened(stack, cache, boot_id=OTHER_BOOT)
    assert trusted(writer, pack) == list(range(8))
    assert writer.counters()["held_bytes"] == MIB


def test_all_frames_and_a_crash_before_the_marker_complete_at_the_next_start(cache, stack, monkeypatch):
    pack = make_pack(random_content(MIB, 5), FRAME)
    add(cache, pack)
    with monkeypatch.context() as patch:
        patch.setattr(cached_pack.CachedPack, "finish", lambda _: False)
        writer = CacheWriter(cache)
        put_all(writer, pack)
        crash(writer)
    assert not cache.is_complete(pack.id)
    opened(stack, cache)
    eventually(lambda: cache.is_complete(pack.id))


@pytest.mark.parametrize("size", [0, MIB - 4096, MIB + 4096])
def test_a_data_file_of_another_size_is_not_believed(cache, stack, size):
    pack = make_pack(random_content(MIB, 6), FRAME)
    add(cache, pack)
    writer = CacheWriter(cache)
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    writer.close()
    os.truncate(cache.data_path(pack.id), size)
    assert not cache.is_complete(pack.id)
    writer = opened(stack, cache)
    assert trusted(writer, pack) == []
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    assert cache.data_path(pack.id).read_bytes() == pack.content


@pytest.mark.parametrize("size", [3 * MIB, 5 * MIB])
def test_a_data_file_of_another_size_is_not_touched_below_a_native_mount(cache, stack, size):
    pack = make_pack(random_content(4 * MIB, 6), FRAME)
    add(cache, pack)
    writer = CacheWriter(cache)
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    writer.close()
    cache.pin(pack.id, "tree-of a mount")
    data = cache.data_path(pack.id)
    os.truncate(data, size)
    before = data.read_bytes()
    for _ in range(2):  # also by the writer after the one that finds it so
        writer = CacheWriter(cache)
        assert not writer.put(pack.id, 0, frame_of(pack, 0))
        assert data.read_bytes() == before
        assert not (cache.folder(pack.id) / "complete").exists()
        writer.close()
    writer = opened(stack, cache)
    cache.unpin(pack.id, "tree-of a mount")
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    assert data.read_bytes() == pack.content


@pytest.mark.parametrize("spoiled", ["bitmap", "complete"])
def test_a_mounted_data_file_keeps_its_content_when_what_is_said_of_it_is_lost(cache, stack, spoiled):
    pack, other = (make_pack(random_content(size, 6), FRAME) for size in (4 * MIB, 2 * MIB))
    add(cache, pack)
    writer = CacheWriter(cache)
    put_all(writer, pack)
    eventually(lambda: cache.is_complete(pack.id))
    writer.close()
    cache.pin(pack.id, "tree-of a mount")
    bits = Bitmap(FRAME, other.index.content_size, OTHER_BOOT)
    (cache.folder(pack.id) / "bitmap").write_bytes(bits.header() + bits.trusted + bits.suspect)
    if spoiled == "complete":
        (cache.folder(pack.id) / "complete").unlink()
    writer = opened(stack, cache)
    assert trusted(writer, pack) == []
    assert cache.data_path(pack.id).read_bytes() == pack.content


def test_space_without_a_bit_is_given_back(cache, stack):
    pack = make_pack(random_content(8 * MIB, 7), FRAME)
    add(cache, pack)
    writer = CacheWriter(cache)
    writer.put(pack.id, 5, frame_of(pack, 5))
    crash(writer)
    with cache.data_path(pack.id).open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * 4 * MIB)
        os.fsync(file.fileno())
    writer = opened(stack, cache)
    assert allocated(cache, pack) < MIB
    assert in_cache(writer, pack, 5) == pack.content[5 * FRAME : 6 * FRAME]


def test_the_size_bounds_what_is_kept_and_the_oldest_goes(tmp_path, stack):
    cache = NodeCache(tmp_path / "cache", size=16 * MIB)
    packs = [make_pack(random_content(8 * MIB, 10 + i), FRAME) for i in range(3)]
    add(cache, *packs)
    writer = opened(stack, cache)
    put_all(writer, packs[0])
    put_all(writer, packs[1])
    eventually(lambda: cache.is_complete(packs[0].id))
    with cache.locked(packs[0].id):
        pass  # who completed it has let go of it: a pack in use is not evicted
    assert in_cache(writer, packs[0], 40) is not None  # its second half was just used
    for number in range(32):
        assert writer.put(packs[2].id, number, frame_of(packs[2], number))
        assert writer.counters()["held_bytes"] <= 16 * MIB
    assert writer.counters()["evicted_bytes"] == 4 * MIB
    assert not cache.is_complete(packs[0].id)
    assert trusted(writer, packs[0]) == list(range(32, 64))
    assert trusted(writer, packs[1]) == list(range(64))
    eventually(lambda: sum(allocated(cache, p) for p in packs) <= 16 * MIB)


def test_a_pinned_pack_is_never_touched_under_pressure(tmp_path, stack):
    cache = NodeCache(tmp_path / "cache", size=4 * MIB)
    pinned, other = (make_pack(random_content(size, 20), FRAME) for size in (3 * MIB, 8 * MIB))
    add(cache, pinned, other)
    writer = opened(stack, cache)
    put_all(writer, pinned)
    eventually(lambda: cache.is_complete(pinned.id))
    NodeCache(cache.root).pin(pinned.id, "tree/of another process")
    for number in range(64):
        writer.put(other.id, number, frame_of(other, number))
    assert writer.counters()["evicted_bytes"] > 0
    assert cache.is_complete(pinned.id)
    assert cache.data_path(pinned.id).read_bytes() == pinned.content
    cache.pin(other.id, "me")
    rest = make_pack(random_content(2 * MIB, 21), FRAME)
    add(cache, rest)
    assert not writer.put(rest.id, 0, frame_of(rest, 0)) or writer.counters()["held_bytes"] <= 4 * MIB
    cache.unpin(pinned.id, "tree/of another process")
    cache.unpin(pinned.id, "tree/of another process")
    writer._evictor._idle_until = 0
    put_all(writer, rest)
    assert not cache.is_complete(pinned.id)


def test_a_pin_holds_from_the_moment_it_returns(tmp_path, stack):
    cache = NodeCache(tmp_path / "cache", size=2 * MIB)
    victim, other = (make_pack(random_content(2 * MIB, 30 + i), FRAME) for i in range(2))
    add(cache, victim, other)
    writer = opened(stack, cache)
    stop = threading.Event()
    held = 0

    def press():
        while not stop.is_set():
            for pack in (victim, other):
                for number in range(16):
                    writer.put(pack.id, number, frame_of(pack, number))

    thread = threading.Thread(target=press)
    thread.start()
    try:
        until = time.monotonic() + 2
        mounter = NodeCache(cache.root)
        while held < 20 and (time.monotonic() < until or not held):
            mounter.pin(victim.id, "m")
            if mounter.is_complete(victim.id):
                held += 1
                assert mounter.data_path(victim.id).read_bytes() == victim.content
                assert mounter.is_complete(victim.id)
            mounter.unpin(victim.id, "m")
            writer._evictor._idle_until = 0
    finally:
        stop.set()
        thread.join()
    assert held


def test_readers_during_eviction_see_only_right_bytes(tmp_path, stack):
    cache = NodeCache(tmp_path / "cache", size=4 * MIB)
    packs = [make_pack(random_content(4 * MIB, 40 + i), FRAME) for i in range(2)]
    add(cache, *packs)
    writer = opened(stack, cache)
    stop = threading.Event()
    wrong, hits = [], []

    def reader(pack):
        buffer = bytearray(FRAME)
        while not stop.is_set():
            for number in range(32):
                if writer.pack(pack.id).read_into(number * FRAME, memoryview(buffer)):
                    hits.append(1)
                    if buffer != pack.content[number * FRAME :][:FRAME]:
                        wrong.append((pack.id, number))

    threads = [threading.Thread(target=reader, args=(pack,)) for pack in packs * 2]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and (writer.counters()["evicted_bytes"] < 24 * MIB or len(hits) < 100):
            for pack in packs:
                for number in range(32):
                    writer.put(pack.id, number, frame_of(pack, number))
                    writer._evictor._idle_until = 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(hits) >= 100
    assert writer.counters()["evicted_bytes"] >= 24 * MIB


def test_where_holes_cannot_be_punched_whole_packs_go(tmp_path, stack, monkeypatch):
    monkeypatch.setattr(cached_pack, "punch", lambda *_: False)
    cache = NodeCache(tmp_path / "cache", size=16 * MIB)
    packs = [make_pack(random_content(8 * MIB, 50 + i), FRAME) for i in range(3)]
    add(cache, *packs)
    writer = opened(stack, cache)
    put_all(writer, packs[0])
    put_all(writer, packs[1])
    eventually(lambda: all(cache.is_complete(p.id) for p in packs[:2]))  # a pack being completed is not evicted
    eventually(lambda: writer.put(packs[2].id, 0, frame_of(packs[2], 0)))
    assert trusted(writer, packs[0]) == []
    assert cache.data_path(packs[0].id).stat().st_size == 8 * MIB
    assert allocated(cache, packs[0]) == 0
    assert trusted(writer, packs[1]) == list(range(64))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_evicts_and_never_fails_a_read(small_disk, stack):
    memory = MemoryStore()
    packs = [make_pack(random_content(8 * MIB, 60 + i), FRAME).publish(memory) for i in range(3)]
    cache = NodeCache(small_disk / "cache")
    add(cache, *packs)
    writer = opened(stack, cache)
    reader = stack.enter_context(contextlib.closing(PackReader(memory, writer, readahead=0)))
    for pack in packs:
        for offset in range(0, 8 * MIB, MIB):
            assert read(reader, pack.id, offset, MIB) == pack.content[offset : offset + MIB]
    counters = reader.counters()
    assert counters["kept_write_errors"] > 0
    assert counters["kept_evicted_bytes"] > 0
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb") as file:
        file.write(bytes(16 * MIB))
    for pack in packs:
        cache.pin(pack.id, "all")  # nothing may go now
    assert read(reader, packs[0].id, 0, 8 * MIB) == packs[0].content


def test_min_free_is_left_to_others(small_disk, stack):
    pack = make_pack(random_content(16 * MIB, 70), FRAME)
    cache = NodeCache(small_disk / "cache", min_free=6 * MIB)
    add(cache, pack)
    writer = opened(stack, cache)
    for number in range(128):
        writer.put(pack.id, number, frame_of(pack, number))
        status = os.statvfs(small_disk)
        assert status.f_bavail * status.f_frsize >= 6 * MIB
    assert writer.counters()["write_errors"] == 0
    assert writer.counters()["held_bytes"] > 3 * MIB


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_writes_never_fails_a_read(cache, stack, monkeypatch, code):
    memory = MemoryStore()
    pack = make_pack(random_content(2 * MIB, 80), FRAME).publish(memory)
    add(cache, pack)
    writer = opened(stack, cache)
    reader = stack.enter_context(contextlib.closing(PackReader(memory, writer, readahead=0)))

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cached_pack, "write_all", fail)
        assert read(reader, pack.id, 0, 2 * MIB) == pack.content
        eventually(lambda: reader.counters()["kept_bypassed_frames"] == 16)
    assert reader.counters()["kept_write_errors"] == 2  # of one run of frames, tried twice
    assert writer.counters()["held_bytes"] == 0


def test_a_disk_that_fails_reads_never_fails_a_read(cache, stack, monkeypatch):
    memory = MemoryStore()
    pack = make_pack(random_content(MIB, 81), FRAME).publish(memory)
    add(cache, pack)
    writer = opened(stack, cache)
    put_all(writer, pack)
    reader = stack.enter_context(contextlib.closing(PackReader(memory, writer, readahead=0)))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        assert read(reader, pack.id, 10, 1000) == pack.content[10:1010]
    assert reader.counters()["kept_read_errors"] == 1
    assert read(reader, pack.id, 0, MIB) == pack.content


def test_a_frame_never_lands_in_anothers_place(cache, stack):
    pack = make_pack(random_content(MIB, 82), FRAME)
    add(cache, pack)
    writer = opened(stack, cache)
    with pytest.raises(DamagedError):
        writer.put(pack.id, 1, frame_of(pack, 2))
    assert not writer.put("0" * 64, 1, frame_of(pack, 1))


def test_pins_need_a_pack_and_survive_restarts(cache):
    pack = make_pack(random_content(MIB, 83), FRAME)
    with pytest.raises(NotFoundError):
        cache.pin(pack.id, "x")
    add(cache, pack)
    owners = {"tree/ab cd", "..", "ü%2F"}
    for owner in owners - {".."}:
        cache.pin(pack.id, owner)
        cache.pin(pack.id, owner)
    assert NodeCache(cache.root).pins(pack.id) == owners - {".."}


def in_memory(writer, pack, number):
    """Whether a frame of the cache is in the page cache."""
    size = pack.index.frame_size
    # Else asking for one frame has the kernel read the next ones ahead, and they are there when they are asked for.
    os.posix_fadvise(writer.pack(pack.id).open().data, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return writer.pack(pack.id).read_into(number * size, memoryview(bytearray(size)), wait=False)
    except BlockingIOError:
        return False


def test_what_a_stream_has_read_leaves_the_page_cache_and_stays_on_the_disk(stack):
    # Not on tmpfs, which has no disk behind its pages.
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
    cache = NodeCache(Path(folder))
    pack = make_pack(random_content(8 * MIB, 50), FRAME)
    add(cache, pack)
    writer = opened(stack, cache)
    put_all(writer, pack)
    assert all(in_memory(writer, pack, number) for number in range(64))
    os.fsync(writer.pack(pack.id).open().data)

    def gone():
        writer.let_go(pack.id, 0, 4 * MIB)
        return not any(in_memory(writer, pack, number) for number in range(32))

    eventually(gone)
    assert all(in_memory(writer, pack, number) for number in range(32, 64))
    assert trusted(writer, pack) == list(range(64))
    assert in_cache(writer, pack, 5) == pack.content[5 * FRAME : 6 * FRAME]


def test_letting_go_of_what_is_not_there_is_no_error(tmp_path, stack):
    writer = opened(stack, NodeCache(tmp_path / "cache"))
    writer.let_go("0" * 64, 0, MIB)


@pytest.fixture
def on_disk(stack):
    """A cache on a disk: tmpfs has none behind its pages."""
    return NodeCache(Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))))


def put_run(writer, pack, first, count):
    blocks, frames = Blocks(), []
    for number in range(first, first + count):
        content = blocks.take(pack.index.content_length(number))
        content[:] = frame_of(pack, number).content
        frames.append(VerifiedFrame(content, pack.index.frames[number].digest))
    return writer.put_run(pack.id, first, frames, direct=True)


def test_what_is_written_past_the_page_cache_is_on_the_disk_alone(on_disk, stack):
    pack = make_pack(random_content(3 * MIB + 4096, 51), FRAME)  # the last frame is a block
    add(on_disk, pack)
    writer = opened(stack, on_disk)
    assert put_run(writer, pack, 0, 10)
    assert put_run(writer, pack, 10, 15)
    assert put_run(writer, pack, 3, 4)  # there already
    assert not any(in_memory(writer, pack, number) for number in range(25))
    assert b"".join(in_cache(writer, pack, number) for number in range(25)) == pack.content
    eventually(lambda: on_disk.is_complete(pack.id))
    assert writer.counters()["held_bytes"] == 3 * MIB + 4096


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_where_nothing_can_be_written_past_the_page_cache_it_is_written_through_it(
    on_disk, stack, monkeypatch, refuses
):
    real, refused = {"open": os.open, "write": packfiles.write_pieces}[refuses], []

    def refuse(where, *arguments):
        flags = arguments[0] if refuses == "open" else fcntl.fcntl(where, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refused.append(where)
            raise OSError(errno.EINVAL, "no")
        return real(where, *arguments)

    monkeypatch.setattr(*{"open": (os, "open"), "write": (packfiles, "write_pieces")}[refuses], refuse)
    pack = make_pack(random_content(MIB, 52), FRAME)
    add(on_disk, pack)
    writer = opened(stack, on_disk)
    assert put_run(writer, pack, 0, 8)
    assert b"".join(in_cache(writer, pack, number) for number in range(8)) == pack.content
    assert writer.counters()["write_errors"] == 0
    assert len(refused) == 1


def test_frames_that_an_eviction_took_along_while_they_were_written_are_written_again(on_disk, stack, monkeypatch):
    pack = make_pack(random_content(MIB, 53), FRAME)
    add(on_disk, pack)
    writer = opened(stack, on_disk)
    assert put_run(writer, pack, 0, 2)
    monkeypatch.setattr(cached_pack, "punch", lambda *_: False)  # so that all of the pack goes
    write, writes = packfiles.write_pieces, []

    def and_evict(*arguments):
        write(*arguments)
        writes.append(arguments)
        if len(writes) == 1:
            assert writer.evict(1) == 2 * FRAME

    monkeypatch.setattr(packfiles, "write_pieces", and_evict)
    assert put_run(writer, pack, 4, 3)
    assert len(writes) == 2
    assert trusted(writer, pack) == [4, 5, 6]
    assert [in_cache(writer, pack, number) for number in (4, 5, 6)] == [
        pack.content[number * FRAME :][:FRAME] for number in (4, 5, 6)
    ]
    assert writer.counters()["held_bytes"] == 3 * FRAME


def test_a_bitmap_that_fails_amid_a_run_leaves_a_true_account(on_disk, stack, monkeypatch):
    pack = make_pack(random_content(MIB, 54), FRAME)
    add(on_disk, pack)
    writer = opened(stack, on_disk)
    assert put_run(writer, pack, 0, 1)  # its first change writes all of the bitmap
    write, bits = cached_pack.write_all, []

    def failing(fd, data, offset):
        if len(data) == 1:
            bits.append(offset)
            if len(bits) == 4:
                raise OSError(errno.ENOSPC, "no")
        write(fd, data, offset)

    monkeypatch.setattr(cached_pack, "write_all", failing)
    assert put_run(writer, pack, 0, 8)  # at its second attempt
    assert len(bits) > 7
    assert trusted(writer, pack) == list(range(8))
    assert writer.counters()["held_bytes"] == MIB


def assert_a_forked_child_has_all_of(descriptors):
    subprocess.run(["true"], preexec_fn=lambda: [os.fstat(fd) for fd in descriptors], check=True, timeout=60)


def test_a_child_keeps_what_took_the_number_of_a_cache_that_could_not_be_opened(cache, stack, monkeypatch):
    def fails(_cache, _lock):
        raise DamagedError("no packs can be read")

    monkeypatch.setattr("floe.store.cache.writer.leave_packs", fails)
    with pytest.raises(DamagedError):
        CacheWriter(cache)
    monkeypatch.undo()
    pipes = [fd for _ in range(4) for fd in os.pipe()]
    stack.callback(lambda: [os.close(fd) for fd in pipes])
    assert_a_forked_child_has_all_of(pipes)
    opened(stack, cache)


def test_a_child_keeps_what_took_the_number_of_a_lock_that_was_closed(cache, stack):
    os.close(ownership.own(cache.root / "writer.lock", 1).fd)
    pipes = [fd for _ in range(4) for fd in os.pipe()]
    stack.callback(lambda: [os.close(fd) for fd in pipes])
    assert_a_forked_child_has_all_of(pipes)
