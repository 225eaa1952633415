"""Content of a tree's files into memory, through any Reader of packs (see fuse/reader.py)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from floe.fuse.reader import Done, Reader, Ticket, fill
from floe.store.erofs_inodes import Extent, Inode, Inodes
from floe.store.errors import FloeError
from floe.store.ids import Buffer

_PIECE = 4 << 20  # bytes of one read
_WINDOW = 8  # reads under way for one caller; together well below what a reader may hold in memory


def read_into(image: Inodes, reader: Reader, inode: Inode, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from byte `offset` of a regular file; the bytes read, fewer than its length at the file's end only.

    Every byte was verified. Raises the store's errors: then nothing can be said about what is in `buffer`.
    """
    extents = image.extents(inode, offset, len(buffer))
    window = _Window(reader)
    at = 0
    try:
        for extent in extents:
            for start in range(0, extent.length, _PIECE):
                length = min(_PIECE, extent.length - start)
                window.read(extent._replace(offset=extent.offset + start, length=length), buffer[at : at + length])
                at += length
        window.finish()
    except BaseException:
        window.cancel()
        raise
    return at


class _Window:
    """Reads under way, at most `_WINDOW` of them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._changed = threading.Condition()  # guards the three below
        self._under_way = 0
        self._error: FloeError | None = None
        self._cancelled = False
        self._tickets: list[Ticket] = []

    def read(self, extent: Extent, part: memoryview) -> None:
        """Fill `part`, now or by `finish`."""
        if extent.pack is None:
            part[:] = bytes(len(part))
            return
        pieces = self._reader.on_hand(extent.pack, extent.offset, extent.length)
        if pieces is not None:
            fill(part, pieces)
            return
        try:
            if self._reader.read_cached_into(extent.pack, extent.offset, part, wait=False):
                return
        except BlockingIOError:
            pass
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < _WINDOW)
            if self._error is not None:
                raise self._error
            self._under_way += 1
        self._tickets.append(self._reader.submit(extent.pack, extent.offset, extent.length, self._done(part)))

    def finish(self) -> None:
        """Wait for all; raises the first error."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)
            if self._error is not None:
                raise self._error

    def cancel(self) -> None:
        """Nobody wants the rest, and what arrives later is dropped."""
        with self._changed:
            self._cancelled = True
        for ticket in self._tickets:
            ticket.cancel()

    def _done(self, part: memoryview) -> Done:
        def done(result: Sequence[Buffer] | FloeError) -> None:
            error: FloeError | None = None
            with self._changed:
                wanted = not self._cancelled
            if isinstance(result, FloeError):
                error = result
            elif wanted:
                try:
                    fill(part, result)
                except ValueError as wrong:
                    error = FloeError(f"a read gave what was not asked for: {wrong}")
            with self._changed:
                self._error = self._error or error
                self._under_way -= 1
                self._changed.notify_all()

        return done
