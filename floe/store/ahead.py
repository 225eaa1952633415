"""Fetching what sequential readers will ask for next, with memory that nobody else wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from floe.store.budget import Budget, Lease
from floe.store.cache import CacheWriter
from floe.store.errors import FloeError
from floe.store.frames import FrameTable
from floe.store.readahead import Streams

_PAUSE = 10.0  # seconds without reading ahead after the cache could not keep what came


class Ahead:
    """Part of a fetcher, in its event loop. `limit`: largest window in bytes; 0: nothing is fetched ahead.

    `is_absent` says of a frame of a pack whether it is neither here nor on its way, `fetch` begins to fetch such frames,
    and `clock` gives seconds.
    """

    def __init__(
        self,
        limit: int,
        writer: CacheWriter,
        budget: Budget,
        *,
        is_absent: Callable[[str, int], bool],
        fetch: Callable[[str, FrameTable, list[int], Lease], None],
        clock: Callable[[], float],
    ) -> None:
        self._streams = Streams(limit) if limit else None
        self._writer = writer
        self._budget = budget
        self._is_absent = is_absent
        self._fetch = fetch
        self._clock = clock
        self._from = 0.0
        self.marks: dict[str, list[tuple[int, int]]] = {}  # read by other threads; replaced, never changed

    def pause(self) -> None:
        """The cache could not keep a frame: what comes ahead would be lost."""
        self._from = self._clock() + _PAUSE

    def look(self, pack_id: str, offset: int, length: int, *, waited: bool) -> None:
        """Take note of a read of content bytes, and fetch what it makes likely; `waited`: it was not in the cache."""
        streams, table = self._streams, None
        if streams is None:
            return
        stream = streams.note(pack_id, offset, length, waited=waited)
        if stream.established and self._clock() >= self._from:
            with contextlib.suppress(FloeError):  # the index cannot be read now: who reads on is told
                table = self._writer.table(pack_id)
        while table is not None:
            piece = stream.next_piece(streams.limit, table.content_size)
            if piece is None or not self._ask(pack_id, table, *piece):
                break
            stream.ahead = piece[1]
        passed = stream.passed()
        if passed is not None:
            self._writer.let_go(pack_id, *passed)
        marks = list(streams.marks(pack_id))
        if marks:
            self.marks[pack_id] = marks
        else:
            self.marks.pop(pack_id, None)

    def _ask(self, pack_id: str, table: FrameTable, start: int, stop: int) -> bool:
        """Fetch what is missing of content bytes [start, stop); False when there is no memory to spare."""
        size = table.frame_size
        frames = [frame for frame in range(start // size, -(-stop // size)) if self._is_absent(pack_id, frame)]
        if not frames:
            return True
        lease = self._budget.try_lease(pack_id, sum(map(table.memory, frames)))
        if lease is None:
            return False
        self._fetch(pack_id, table, frames, lease)
        lease.drop()
        return True
