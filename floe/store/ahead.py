"""Fetching what sequential readers will ask for next, with memory that nobody else wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from floe.store.budget import Budget, Lease
from floe.store.cache import Writer
from floe.store.errors import FloeError
from floe.store.frames import FrameTable
from floe.store.onhand import OnHand
from floe.store.readahead import Stream, Streams
from floe.store.reading import Get

_LEAST = 4 << 20  # bytes of a window, however many streams there are
_TICK = 0.1  # seconds


class _UnderWay:
    """Requests ahead of a stream; when the reader was last seen to get on, and what it had read then."""

    __slots__ = ("gets", "pack_id", "read", "since")

    def __init__(self, pack_id: str, now: float) -> None:
        self.pack_id = pack_id
        self.gets: list[Get] = []
        self.read = (0, 0)
        self.since = now


class Ahead:
    """Part of a fetcher, in its event loop. `limit`: largest window in bytes; 0: nothing is fetched ahead.

    `is_absent` says of a frame of a pack whether it is neither here nor on its way, `fetch` begins to fetch such frames,
    `give_up` ends a request that nobody waits for. What was fetched is in `on_hand`.
    """

    def __init__(
        self,
        limit: int,
        writer: Writer,
        budget: Budget,
        on_hand: OnHand,
        *,
        is_absent: Callable[[str, int], bool],
        fetch: Callable[[str, FrameTable, list[int], Lease], list[Get]],
        give_up: Callable[[Get], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._streams = Streams(limit, loop.time) if limit else None
        self._give_up = give_up
        self._loop = loop
        self._under_way: dict[Stream, _UnderWay] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.left = 0  # streams whose reader went away while requests were under way
        self._writer = writer
        self._budget = budget
        self._on_hand = on_hand
        self._is_absent = is_absent
        self._fetch = fetch
        self.marks: dict[str, list[tuple[int, int]]] = {}  # read by other threads; replaced, never changed

    def look(self, pack_id: str, offset: int, length: int, *, waited: bool) -> None:
        """Take note of a read of content bytes, and fetch what it makes likely; `waited`: it was not in the cache."""
        streams, table = self._streams, None
        if streams is None:
            return
        stream = streams.note(pack_id, offset, length, waited=waited)
        passed = stream.passed()  # first: what it gives back is there to be asked for
        if passed is not None:
            self._on_hand.passed(pack_id, *passed)
            self._writer.let_go(pack_id, *passed)
        if stream.established:
            with contextlib.suppress(FloeError):  # the index cannot be read now: who reads on is told
                table = self._writer.table(pack_id)
        while table is not None:
            # Shared among the streams at work: many of them get on with less each, and none waits for all of another's.
            others = len(self._under_way) + (stream not in self._under_way)
            limit = min(streams.limit, max(self._budget.spare // others, _LEAST))
            piece = stream.next_piece(limit, table.content_size)
            if piece is None or not self._ask(pack_id, table, stream, *piece):
                break
            stream.ahead = piece[1]
        marks = list(streams.marks(pack_id))
        if marks:
            self.marks[pack_id] = marks
        else:
            self.marks.pop(pack_id, None)

    def _ask(self, pack_id: str, table: FrameTable, stream: Stream, start: int, stop: int) -> bool:
        """Fetch what is missing of content bytes [start, stop) for a stream; False when there is no memory to spare."""
        size = table.frame_size
        frames = [frame for frame in range(start // size, -(-stop // size)) if self._is_absent(pack_id, frame)]
        if not frames:
            return True
        need = sum(map(table.memory, frames))
        lease = self._budget.try_lease(pack_id, need)
        if lease is None:
            soon = (pack_id, stream.end, stream.ahead)
            self._on_hand.make_room(need, soon, urgent=stream.ahead - stream.end < need)
            lease = self._budget.try_lease(pack_id, need)
        if lease is None:
            return False
        gets = self._fetch(pack_id, table, frames, lease)
        lease.drop()
        self._under_way.setdefault(stream, _UnderWay(pack_id, self._loop.time())).gets.extend(gets)
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK, self._watch)
        return True

    def took(self, seconds: float) -> None:
        """A request has ended well."""
        if self._streams is not None:
            self._streams.took(seconds)

    def _watch(self) -> None:
        """Look which streams get on; what was asked for on behalf of a reader that went elsewhere is given up."""
        now = self._loop.time()
        for stream, under_way in list(self._under_way.items()):
            gets = under_way.gets = [get for get in under_way.gets if not get.ended]
            read = (stream.reads, self._on_hand.count_read(under_way.pack_id, stream.end, stream.ahead))
            if not gets:
                del self._under_way[stream]
            elif read != under_way.read or any(get.wanted for get in gets):
                stream.paused(now - under_way.since)
                under_way.read, under_way.since = read, now
            elif now - under_way.since > stream.patience:
                self.left += 1
                for get in gets:
                    self._give_up(get)
                stream.left(min(get.first * get.table.frame_size for get in gets))
                del self._under_way[stream]
        self._timer = self._loop.call_later(_TICK, self._watch) if self._under_way else None

    def stop(self) -> None:
        """Watch nothing more."""
        self._under_way.clear()
        if self._timer is not None:
            self._timer.cancel()
