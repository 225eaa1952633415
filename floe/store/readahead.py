"""What to fetch before it is asked for: several streams in each pack, each with a window that grows. Pure.

A stream is established by reads that continue one another; concurrent reads may arrive out of order. Its window starts small
and grows each time its reader had to wait for what was asked for ahead, up to some times of what the reader takes while
a request is under way: its measured bandwidth times their measured delay. Reads that the cache answers are not reported one by one: `mark` says which ones to report.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator

from cachetools import LRUCache

_FIRST_WINDOW = 2 << 20  # bytes
_GROWTH = 4  # times, once for each window that was too small: three of these reach the largest
_PIECE_MIN, _PIECE_MAX = 1 << 20, 8 << 20  # bytes of one request ahead
_PIECES = 4  # of a window, under way at the same time
_ESTABLISHED = 512 << 10  # bytes in a row; most files of an image are smaller, and random reads never get there
_NEAR = 128 << 10  # bytes; a gap that new streams may have, a skipped small file
_REORDERED = 2 << 20  # bytes; how far out of order the kernel's parallel reads may come
_STREAMS, _PACKS = 32, 256  # remembered for a pack; packs remembered
_SAMPLE = 0.05  # seconds, the least over which a reader's bandwidth is measured
_SAMPLES, _DELAYS = 4, 16  # measurements remembered
_ROOM = 3  # times bandwidth times delay: both vary
_PATIENCE = 0.3  # seconds without a read after which a stream counts as left, unless it has paused for as long before


class Stream:
    """One reader's way through a pack. Offsets and sizes in bytes of content."""

    __slots__ = ("_grown", "_rates", "_since", "_taken", "ahead", "end", "kept", "patience", "reads", "start", "window")

    def __init__(self, offset: int, length: int) -> None:
        self.start = offset
        self.end = offset + length  # of what was read
        self.ahead = self.end  # of what was read or asked for
        self.kept = self.end  # from here on nothing was let go
        self.reads = 1
        self.window = _FIRST_WINDOW
        self.patience = _PATIENCE
        self._grown = 0  # before this nothing was asked for with the window as it is
        self._rates: deque[float] = deque(maxlen=_SAMPLES)  # bytes a second
        self._since: float | None = None  # when the measurement under way began, in seconds
        self._taken = 0  # and where the reader was then

    @property
    def established(self) -> bool:
        """Whether this is worth reading ahead for."""
        return self.reads > 1 and self.end - self.start >= _ESTABLISHED

    def continues(self, offset: int, length: int) -> bool:
        """Whether a read may be this stream's."""
        if self.established:
            return max(self.start, self.end - _REORDERED) <= offset <= max(self.ahead, self.end + _REORDERED)
        return offset <= self.end + _NEAR and offset + length >= self.start - _NEAR

    def read(self, offset: int, length: int, limit: int, delay: float, now: float, *, waited: bool) -> None:
        """Take note of a read at `now`; `waited`: it was not in the cache. `delay`: seconds that requests take."""
        self._measure(now)
        if waited and self.established and offset + length > self._grown:
            enough = _ROOM * max(self._rates) * delay + 2 * _PIECE_MAX if self._rates else math.inf
            self.window = max(self.window, int(min(self.window * _GROWTH, limit, max(enough, _FIRST_WINDOW))))
            self._grown = self.ahead
        self.reads += 1
        self.start = min(self.start, offset)
        self.end = max(self.end, offset + length)
        self.ahead = max(self.ahead, self.end)

    def _measure(self, now: float) -> None:
        if self._since is None or now - self._since > _PATIENCE:  # a pause is no measure of what it can take
            self._since, self._taken = now, self.end
        elif now - self._since >= _SAMPLE:
            self._rates.append((self.end - self._taken) / (now - self._since))
            self._since, self._taken = now, self.end

    def piece(self, limit: int) -> int:
        """Bytes of the next request ahead."""
        return min(max(min(self.window, limit) // _PIECES, _PIECE_MIN), _PIECE_MAX, limit)

    def left(self, ahead: int) -> None:
        """Its reader seems to have gone: what lies behind `ahead` is not fetched, and it begins small if it comes back."""
        self.ahead = max(self.end, min(self.ahead, ahead))
        self.window = max(_FIRST_WINDOW, self.window // 4)

    def paused(self, seconds: float) -> None:
        """Its reader came back after that long."""
        self.patience = max(self.patience, min(4 * seconds, 20 * _PATIENCE))

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
    """The streams of all packs. `limit` is the largest window in bytes, `clock` gives seconds."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._delays: deque[float] = deque(maxlen=_DELAYS)
        self._packs: LRUCache[str, list[Stream]] = LRUCache(_PACKS)

    def note(self, pack_id: str, offset: int, length: int, *, waited: bool) -> Stream:
        """The stream that this read belongs to, perhaps a new one."""
        streams = self._packs.get(pack_id)
        if streams is None:
            streams = self._packs[pack_id] = []
        for position, stream in enumerate(streams):
            if stream.continues(offset, length):
                stream.read(offset, length, self.limit, self.delay, self._clock(), waited=waited)
                streams.insert(0, streams.pop(position))
                return stream
        streams.insert(0, Stream(offset, length))
        del streams[_STREAMS:]
        return streams[0]

    @property
    def delay(self) -> float:
        """Seconds from the beginning of a request ahead to its end; the shortest of the last ones, without queueing for others."""
        return min(self._delays, default=math.inf)

    def took(self, seconds: float) -> None:
        """A request ahead has come to its end."""
        self._delays.append(seconds)

    def marks(self, pack_id: str) -> Iterator[tuple[int, int]]:
        """The marks of all streams of a pack."""
        for stream in self._packs.get(pack_id, ()):
            mark = stream.mark(self.limit)
            if mark is not None:
                yield mark
