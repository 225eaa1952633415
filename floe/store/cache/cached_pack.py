"""One pack's frames in the cache, in the writer's hands.

Concurrency: `lock` guards every change of bits and data. Readers take no lock: they test bits, read, and look whether
`generation` is still what it was before. Whoever takes frames away clears their bits and counts `generation` up before
the data goes, so a reader that raced with it notices and throws its bytes away. A process killed at any point
leaves at worst data without a bit, which loading gives back to the disk.
"""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from floe.store.cache.bitmap import HEADER_BYTES, Bitmap, runs
from floe.store.cache.durable import is_in_memory, punch, sync_folder, write_all
from floe.store.cache.eviction import EMPTY, EXTENT, EXTENT_SHIFT, UNREAD
from floe.store.cache.packfiles import Files
from floe.store.cache.usage import Usage
from floe.store.ids import Buffer
from floe.store.process import NO_DESCRIPTORS

_log = logging.getLogger(__name__)

_SLACK = 1 << 20  # bytes of disk beyond the present frames that are not worth looking for


class NotKeptError(OSError):
    """The disk did not take data that was written. The kernel holds it as if it had: what memory says of it proves nothing."""


class CachedPack:
    """The frames of `folder`, whose `data` exists with its full size. OSError from all but `read_into` and `load`."""

    def __init__(
        self, pack_id: str, folder: Path, bits: Bitmap, usage: Usage, opened: Callable[[CachedPack], None]
    ) -> None:
        self.id = pack_id
        self.folder = folder
        self.bits = bits
        self.lock = threading.Lock()
        self.generation = 0
        self.complete = False
        self.changed = False  # since this process loaded it
        self.files: Files | None = None
        self._loaded = 0
        extents = -(-bits.content_size // EXTENT)
        self.recency = array("I", [EMPTY]) * extents
        self.bypass = usage.bypass
        self._usage = usage
        self._opened = opened
        self._shift = bits.frame_size.bit_length() - 1
        self._content_size = bits.content_size
        self._trusted = bits.trusted

    def load(self, boot_id: str, recency: int, allocated: int) -> None:
        """Make the bits, and their file, say what may be believed; see bitmap.py. `allocated`: bytes the data takes."""
        bits = self.bits
        if self.complete:
            bits.fill()
        elif not bits.clean and bits.boot_id != boot_id:
            bits.distrust()
            self._rewrite(boot_id)
        if not self.complete and allocated > bits.held() + _SLACK:
            self._return_leaks()
        self._loaded = recency
        for extent in {f >> (EXTENT_SHIFT - self._shift) for f in bits.present()}:
            self.recency[extent] = recency

    def _rewrite(self, boot_id: str) -> bool:
        """Write distrusted bits so that a death between two writes never leaves a bit that says too much."""
        bits = self.bits
        try:
            files = self.open()
            os.ftruncate(files.bitmap, HEADER_BYTES + 2 * len(bits.trusted))
            write_all(files.bitmap, bits.suspect, HEADER_BYTES + len(bits.trusted))
            write_all(files.bitmap, bits.trusted, HEADER_BYTES)
            self._write_dirty(files, bits.header(boot_id=boot_id, clean=False), boot_id)
        except OSError as error:
            self.changed = False  # so that the next change writes all of it
            _log.warning("bitmap of pack %s in the cache cannot be written: %s", self.id, str(error))
            return False
        return True

    def _return_leaks(self) -> None:
        """Give back what a killed writer wrote without coming to set its bit, or cleared without coming to punch."""
        present = set(self.bits.present())
        try:
            for first, count in runs([f for f in range(self.bits.count) if f not in present]):
                if not punch(self.open().data, first << self._shift, count << self._shift):
                    return
        except OSError as error:
            _log.warning("unused space of pack %s in the cache cannot be given back: %s", self.id, str(error))

    def open(self) -> Files:
        """The open files, opened when they are not."""
        files = self.files
        if files is None:
            files = self.files = Files(self.folder)
            self._opened(self)
        return files

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool = True) -> bool:
        """Fill `buffer` (of bytes) with the content from `offset` on; False unless all of it is here and trusted.

        With `wait=False` BlockingIOError when that would take the disk: the content is not in the page cache.
        """
        length = len(buffer)
        if offset + length > self._content_size:
            return False
        generation = self.generation
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        if first == last:
            if not self._trusted[first >> 3] >> (first & 7) & 1:
                return False
        elif not self.bits.covers(first, last):
            return False
        try:
            files = self.files or self.open()
            if wait:
                got = files.read_timed(buffer, offset, self.bypass)
            else:
                got = os.preadv(files.data, (buffer,), offset, os.RWF_NOWAIT)
        except OSError as error:
            if not wait:  # from the disk, or a file system that cannot say: the caller asks again
                raise BlockingIOError from error
            if error.errno in NO_DESCRIPTORS:
                return False
            self._usage.fail()
            _log.warning("pack %s in the cache cannot be read, frames are fetched again: %s", self.id, str(error))
            self._forget(range(first, last + 1))
            return False
        if got != length:
            if not wait:  # the part that is in the page cache was given
                raise BlockingIOError
            return False
        if self.generation != generation:
            return False
        self.recency[offset >> EXTENT_SHIFT] = self._usage.now
        return True

    def read_from_memory(self, offset: int, buffer: memoryview) -> bool:
        """As `read_into` if all of it is in the page cache, and without asking the disk for anything; else False."""
        try:
            if is_in_memory((self.files or self.open()).data, offset, len(buffer)) is False:
                return False  # a read that does not wait would have the disk begin all the same
            return self.read_into(offset, buffer, wait=False)
        except OSError:
            return False

    def let_go(self, start: int, stop: int) -> None:
        """Content bytes [start, stop) need not stay in the page cache: their readers have them in their own."""
        os.posix_fadvise(self.open().data, start, stop - start, os.POSIX_FADV_DONTNEED)

    def store(
        self,
        first: int,
        contents: Sequence[Buffer],
        boot_id: str,
        *,
        reserved: int,
        direct: bool = False,
        unread: bool = False,
    ) -> None:
        """Write adjacent frames from number `first` on, then their bits.

        `reserved` bytes are counted as held for them: what they do not take, since they were there before or on an error, is
        given back. `direct`: past the page cache, since nobody will read them from there soon. `unread`: nobody asked for
        them, so they do not count as just used.
        """
        try:
            for frame in self._store(first, contents, boot_id, direct=direct, unread=unread):
                reserved -= self.bits.content_length(frame)
        finally:
            self._usage.add(-reserved)

    def _store(
        self, first: int, contents: Sequence[Buffer], boot_id: str, *, direct: bool, unread: bool
    ) -> Iterator[int]:
        """Yields frames that take space they did not take before."""
        numbers = range(first, first + len(contents))
        with self.lock:
            if all(map(self.bits.is_trusted, numbers)):
                return
            files, generation = self.open(), self.generation
            if direct:
                files.want_direct()
            self._make_dirty(files, boot_id)
        # Without the lock: it takes long, and nobody reads or punches frames that have no bit.
        files.write(contents, first << self._shift, direct=direct)
        with self.lock:
            if self.generation != generation:  # frames were taken away, and perhaps all of the file with them
                files = self.open()
                files.write(contents, first << self._shift, direct=direct)
            self._make_dirty(files, boot_id)  # a sync may have come in between
            for frame in numbers:
                if not self.bits.is_trusted(frame):
                    fresh = not self.bits.is_suspect(frame)
                    self._trust(files, frame, unread=unread)
                    if fresh:
                        yield frame

    def trust(self, frame: int, generation: int, boot_id: str) -> None:
        """A suspect frame was hashed since `generation`, and matches."""
        with self.lock:
            if self.generation == generation and self.bits.is_suspect(frame):
                files = self.open()
                self._make_dirty(files, boot_id)
                self._trust(files, frame)

    def _trust(self, files: Files, frame: int, *, unread: bool = False) -> None:
        bits, at, bit = self.bits, frame >> 3, 1 << (frame & 7)
        # The file first: what cannot be written there has not happened. The data is there, so it says nothing wrong.
        write_all(files.bitmap, bytes((bits.trusted[at] | bit,)), HEADER_BYTES + at)
        if bits.suspect[at] & bit:
            write_all(files.bitmap, bytes((bits.suspect[at] & ~bit,)), HEADER_BYTES + len(bits.trusted) + at)
        bits.trust(frame)
        extent = frame >> (EXTENT_SHIFT - self._shift)
        if not unread:
            self.recency[extent] = self._usage.now
        elif self.recency[extent] == EMPTY:
            self.recency[extent] = UNREAD

    def _write_bits(self, files: Files, start: int, stop: int) -> None:
        bits = self.bits
        write_all(files.bitmap, bits.trusted[start:stop], HEADER_BYTES + start)
        write_all(files.bitmap, bits.suspect[start:stop], HEADER_BYTES + len(bits.trusted) + start)

    def _make_dirty(self, files: Files, boot_id: str) -> None:
        """Before the first change: the file on disk must not go on calling itself clean."""
        if self.changed:
            return
        whole = self.bits.encode(boot_id=boot_id, clean=False)
        os.ftruncate(files.bitmap, len(whole))
        self._write_dirty(files, whole, boot_id)
        self.changed = True

    def _write_dirty(self, files: Files, data: bytes, boot_id: str) -> None:
        """Write the file's beginning, which says that it is not clean; only once that is durable it counts as said."""
        write_all(files.bitmap, data, 0)
        if self.bits.clean:
            os.fdatasync(files.bitmap)
        self.bits.clean, self.bits.boot_id = False, boot_id

    def drop(self, frames: Iterable[int], boot_id: str) -> int:
        """Take frames away; the bytes of content that went. Where holes cannot be punched, all of the pack goes.

        The caller holds the pack's flock and saw no pin.
        """
        with self.lock:
            files = self.open()
            if self.complete:
                # Whoever mounts natively believes this name, so it goes first, for good.
                (self.folder / "complete").unlink(missing_ok=True)
                sync_folder(self.folder)
                self.complete = False
            self._make_dirty(files, boot_id)
            going = sorted(frames)
            freed = self._take_away(files, going)
            for first, count in runs(going):
                end = min((first + count) << self._shift, self._content_size)
                try:
                    punched = punch(files.data, first << self._shift, end - (first << self._shift))
                except OSError as error:  # its frames are gone all the same, and other space may be given back
                    self._usage.fail()
                    _log.warning("space of pack %s in the cache cannot be given back: %s", self.id, str(error))
                    continue
                if not punched:
                    freed += self._take_away(files, self.bits.present())
                    os.ftruncate(files.data, 0)
                    os.ftruncate(files.data, self._content_size)
                    return freed
        return freed

    def _take_away(self, files: Files, frames: list[int]) -> int:
        """Clear bits here and in the file, or, with OSError, in neither: data goes only when no bit speaks of it."""
        if not frames:
            return 0
        bits, first, last = self.bits, frames[0] >> 3, (frames[-1] >> 3) + 1
        before = bits.trusted[first:last], bits.suspect[first:last]
        freed = self._clear(frames)
        try:
            self._write_bits(files, first, last)
        except OSError:
            bits.trusted[first:last], bits.suspect[first:last] = before
            self._usage.add(freed)
            for extent in {f >> (EXTENT_SHIFT - self._shift) for f in frames}:
                if self.recency[extent] == EMPTY:
                    self.recency[extent] = self._usage.now
            raise
        return freed

    def _clear(self, frames: list[int]) -> int:
        bits = self.bits
        freed = sum(bits.content_length(f) for f in frames if bits.is_trusted(f) or bits.is_suspect(f))
        for frame in frames:
            bits.clear(frame)
        self.generation += 1
        self._usage.add(-freed)
        per_extent = EXTENT_SHIFT - self._shift
        for extent in {f >> per_extent for f in frames}:
            if not bits.present(extent << per_extent, (extent + 1) << per_extent):
                self.recency[extent] = EMPTY
        return freed

    def forget(self, frame: int) -> None:
        """A frame turned out to be damaged or unreadable. Its space is used again when it is fetched again."""
        self._forget(range(frame, frame + 1))

    def _forget(self, frames: range) -> None:
        with self.lock:
            self._clear(list(frames))
            try:
                self._write_bits(self.open(), frames.start >> 3, (frames.stop - 1 >> 3) + 1)
            except OSError as error:
                self.changed = False  # so that the next change writes all of it
                _log.warning("bitmap of pack %s in the cache cannot be written: %s", self.id, str(error))

    def last_use(self) -> int:
        """Recency of the extent used last; 0 when the pack is empty."""
        return max((r for r in self.recency if r != EMPTY), default=0)

    def note_use(self) -> None:
        """Leave the time of use, if there was any, to the next writer: it orders packs by their bitmap's."""
        if self.last_use() > self._loaded:
            os.utime(self.open().bitmap)

    def sync(self) -> None:
        """Data to disk, then a bitmap that says so: the next boot may trust it. NotKeptError."""
        with self.lock:
            if not self.changed:
                return
            files = self.open()
            self._sync_data(os.fdatasync)
            # Its other pages first: a header that reached the disk before them would vouch for what they said then.
            os.fdatasync(files.bitmap)
            # From now on the file may call itself clean, even if writing that fails: a change has to take it back.
            self.bits.clean, self.changed = True, False
            write_all(files.bitmap, self.bits.header(), 0)
            os.fdatasync(files.bitmap)

    def finish(self) -> bool:
        """When every frame is trusted, sync and say `complete`; the caller holds the pack's flock. False: not yet.

        The sync of gigabytes is done before, without a lock, by `presync`; this one finds little to do. NotKeptError.
        """
        with self.lock:
            if self.complete or not self.bits.is_full():
                return self.complete
            self._sync_data(os.fsync)
            marker = os.open(self.folder / "complete", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.fsync(marker)
            finally:
                os.close(marker)
            sync_folder(self.folder)
            self.complete = True
        return True

    def distrust(self, boot_id: str) -> None:
        """The disk failed to keep what was written: hash every frame again before its next use."""
        with self.lock:
            self.bits.distrust()
            self.generation += 1
            self._take_back(boot_id)

    def lose(self, boot_id: str) -> None:
        """The disk did not take what was written: no frame counts any more, whatever memory still has of them."""
        with self.lock:
            self._clear(self.bits.present())
            if self._take_back(boot_id):
                with suppress(OSError):  # space, and pages of what never came to the disk
                    os.ftruncate(self.open().data, 0)
                    os.ftruncate(self.open().data, self._content_size)

    def _take_back(self, boot_id: str) -> bool:
        """Have the file say of no frame more than the bits do now; whether there still is one."""
        if self._rewrite(boot_id):
            return True
        # Then no bitmap at all, rather than one whose bits the next writer would trust.
        with suppress(OSError):
            (self.folder / "bitmap").unlink(missing_ok=True)
        self.files = None
        return False

    def presync(self) -> None:
        """Write data back while readers and writers go on. NotKeptError."""
        self._sync_data(os.fdatasync)

    def _sync_data(self, sync: Callable[[int], None]) -> None:
        data = self.open().data
        try:
            sync(data)
        except OSError as error:
            raise NotKeptError(error.errno, error.strerror) from error
