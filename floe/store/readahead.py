"""What to fetch before it is asked for: several streams in each pack, each with a window that grows. Pure.

A stream is established by reads that continue one another; concurrent reads may arrive out of order. Its window starts small
and doubles each time its reader had to wait although the stream was known, so it settles at about bandwidth times
delay, without measuring either. Reads that the cache answers are not reported one by one: `mark` says which ones to report.
"""

from __future__ import annotations

from collections.abc import Iterator

from cachetools import LRUCache

_FIRST_WINDOW = 2 << 20  # bytes
_PIECE_MIN, _PIECE_MAX = 1 << 20, 8 << 20  # bytes of one request ahead
_PIECES = 4  # of a window, under way at the same time
_ESTABLISHED = 512 << 10  # bytes in a row; most files of an image are smaller, and random reads never get there
_NEAR = 128 << 10  # bytes; a gap that new streams may have, a skipped small file
_REORDERED = 2 << 20  # bytes; how far out of order the kernel's parallel reads may come
_STREAMS, _PACKS = 8, 256  # remembered for a pack; packs remembered


class Stream:
    """One reader's way through a pack. Offsets and sizes in bytes of content."""

    __slots__ = ("ahead", "end", "kept", "reads", "start", "window")

    def __init__(self, offset: int, length: int) -> None:
        self.start = offset
        self.end = offset + length  # of what was read
        self.ahead = self.end  # of what was read or asked for
        self.kept = self.end  # from here on nothing was let go
        self.reads = 1
        self.window = _FIRST_WINDOW

    @property
    def established(self) -> bool:
        """Whether this is worth reading ahead for."""
        return self.reads > 1 and self.end - self.start >= _ESTABLISHED

    def continues(self, offset: int, length: int) -> bool:
        """Whether a read may be this stream's."""
        if self.established:
            return max(self.start, self.end - _REORDERED) <= offset <= max(self.ahead, self.end + _REORDERED)
        return offset <= self.end + _NEAR and offset + length >= self.start - _NEAR

    def read(self, offset: int, length: int, limit: int, *, waited: bool) -> None:
        """Take note of a read; `waited`: it was not in the cache."""
        if waited and self.established:
            self.window = min(self.window * 2, limit)
        self.reads += 1
        self.start = min(self.start, offset)
        self.end = max(self.end, offset + length)
        self.ahead = max(self.ahead, self.end)

    def piece(self, limit: int) -> int:
        """Bytes of the next request ahead."""
        return min(max(self.window // _PIECES, _PIECE_MIN), _PIECE_MAX, limit)

    def next_piece(self, limit: int, content_size: int) -> tuple[int, int] | None:
        """The range to ask for now; None: far enough ahead, or at the pack's end. Then tell `ahead`."""
        if not self.established:
            return None
        stop = self._next_stop(limit)
        if stop > self.end + min(self.window, limit) or self.ahead >= content_size:
            return None
        return self.ahead, min(stop, content_size)

    def _next_stop(self, limit: int) -> int:
        """Where the next request ahead ends: on a boundary, as parts of uploads and servers' own chunks do."""
        piece = self.piece(limit)
        return (self.ahead // piece + 1) * piece

    def passed(self) -> tuple[int, int] | None:
        """The range that the reader has left behind since this was last asked; None: not much."""
        stop = self.end - _REORDERED
        if not self.established or stop - self.kept < _PIECE_MAX:
            return None
        start, self.kept = self.kept, stop
        return start, stop

    def mark(self, limit: int) -> tuple[int, int] | None:
        """Reads that touch this range mean that `next_piece` has something new; None: no such read can come."""
        if not self.established:
            return None
        return max(self._next_stop(limit) - min(self.window, limit), self.end), self.ahead + _REORDERED


class Streams:
    """The streams of all packs. `limit` is the largest window in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._packs: LRUCache[str, list[Stream]] = LRUCache(_PACKS)

    def note(self, pack_id: str, offset: int, length: int, *, waited: bool) -> Stream:
        """The stream that this read belongs to, perhaps a new one."""
        streams = self._packs.get(pack_id)
        if streams is None:
            streams = self._packs[pack_id] = []
        for position, stream in enumerate(streams):
            if stream.continues(offset, length):
                stream.read(offset, length, self.limit, waited=waited)
                streams.insert(0, streams.pop(position))
                return stream
        streams.insert(0, Stream(offset, length))
        del streams[_STREAMS:]
        return streams[0]

    def marks(self, pack_id: str) -> Iterator[tuple[int, int]]:
        """The marks of all streams of a pack."""
        for stream in self._packs.get(pack_id, ()):
            mark = stream.mark(self.limit)
            if mark is not None:
                yield mark
