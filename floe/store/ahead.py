"""Fetching what sequential readers will ask for next, with memory that nobody else wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from floe.store.budget import Budget, Lease
from floe.store.cache import CacheWriter
from floe.store.errors import FloeError
from floe.store.frames import FrameTable
from floe.store.onhand import OnHand
from floe.store.readahead import Stream, Streams


class Ahead:
    """Part of a fetcher, in its event loop. `limit`: largest window in bytes; 0: nothing is fetched ahead.

    `is_absent` says of a frame of a pack whether it is neither here nor on its way, `fetch` begins to fetch such frames.
    What was fetched is in `on_hand`.
    """

    def __init__(
        self,
        limit: int,
        writer: CacheWriter,
        budget: Budget,
        on_hand: OnHand,
        *,
        is_absent: Callable[[str, int], bool],
        fetch: Callable[[str, FrameTable, list[int], Lease], None],
    ) -> None:
        self._streams = Streams(limit) if limit else None
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
            piece = stream.next_piece(streams.limit, table.content_size)
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
        self._fetch(pack_id, table, frames, lease)
        lease.drop()
        return True
