"""Fetching what a profile says will be needed, in its order, with memory and connections that nobody else wants.

Part of a fetcher, in its event loop. A frame on its way is joined by who asks for it, one that is here is passed over. Memory
is taken like reading ahead takes it: from the budget's first half, while no read waits for any.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from floe.store.budget import Budget, Lease
from floe.store.cache import Writer
from floe.store.cache.bitmap import runs
from floe.store.errors import FloeError
from floe.store.frames import FrameTable

RUN_BYTES = 8 << 20  # of content in one request: an image's start is some ten MiB, and requests are most of its time
LARGE_RUN_BYTES = 4 << 20  # with models' frames: gigabytes, which take many connections
LARGE_FRAME = 1 << 20
TOTAL_BYTES = 1 << 30  # of content fetched for one tree
_HORIZON = 64  # frames of the order within which neighbours are fetched together
_PARALLEL = 16  # requests at a time: S3 answers so many small ones in the time of one, and demand has connections left
_TICK = 0.004  # seconds between looks at what has arrived
_LOOKS = 64  # runs looked at between two reads' turns, for all may be here
_KEPT_SHARE = 8  # of the budget
_BY_PROFILE, _FROM_FRONT = "profile", "front"
_UNITS = ("requests", "frames", "bytes")
_FAILURES = 4  # requests in a row that brought nothing, until the rest is left alone


class Run(NamedTuple):
    """Adjacent frames of a pack: from `first` on, up to `stop` without it."""

    pack_id: str
    first: int
    stop: int


def plan(
    frames: Iterable[tuple[str, int]], frame_size: Callable[[str], int], total: int | None = None
) -> Iterator[Run]:
    """Runs of `frames`, given as (pack id, number) in the order of need; `frame_size` gives bytes, 0 for unknown packs.

    Frames that are needed about the same time and lie side by side become one run; each comes once, `total` bytes in all
    (None: TOTAL_BYTES).
    """
    left = TOTAL_BYTES if total is None else total
    order = _once(frame for frame in frames if frame_size(frame[0]))
    while left > 0 and (batch := list(islice(order, _HORIZON))):
        fresh: dict[str, list[int]] = {}
        for pack_id, number in batch:
            if left > 0:
                fresh.setdefault(pack_id, []).append(number)
                left -= frame_size(pack_id)
        found = [run for pack_id, numbers in fresh.items() for run in _runs(pack_id, numbers, frame_size(pack_id))]
        place = {key: position for position, key in reversed(list(enumerate(batch)))}
        yield from sorted(
            found, key=lambda run: min(place[run.pack_id, number] for number in range(run.first, run.stop))
        )


def _once(frames: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Each at its first place: small files side by side name one frame again and again."""
    seen = set[tuple[str, int]]()
    for frame in frames:
        if frame not in seen:
            seen.add(frame)
            yield frame


def _runs(pack_id: str, numbers: list[int], frame_size: int) -> Iterator[Run]:
    most = max(1, (LARGE_RUN_BYTES if frame_size >= LARGE_FRAME else RUN_BYTES) // frame_size)
    for first, count in runs(sorted(numbers)):
        for start in range(first, first + count, most):
            yield Run(pack_id, start, min(start + most, first + count))


class _Order:
    """The runs of one tree that are not asked for yet, and where to note which frames were; `counted`: under which name."""

    def __init__(self, runs: Iterable[Run], fetched: set[tuple[str, int]], counted: str) -> None:
        self.runs = deque(runs)
        self.fetched = fetched
        self.counted = counted
        self.failures = 0


class Replayer:
    """`is_absent` says of a frame of a pack that it is neither here nor on its way, `in_flight` that it is on its way.

    `fetch` begins to fetch absent frames. What arrived may stay in memory until `let_go` is told its pack and range of
    content bytes: this is done when more than an eighth of the budget has arrived since. All methods but `counters` belong to `loop`.
    """

    def __init__(
        self,
        writer: Writer,
        budget: Budget,
        loop: asyncio.AbstractEventLoop,
        *,
        is_absent: Callable[[str, int], bool],
        in_flight: Callable[[tuple[str, int]], bool],
        fetch: Callable[[str, FrameTable, list[int], Lease], object],
        let_go: Callable[[str, int, int], object] = lambda _pack, _start, _stop: None,
    ) -> None:
        self._writer = writer
        self._budget = budget
        self._loop = loop
        self._is_absent = is_absent
        self._in_flight = in_flight
        self._fetch = fetch
        self._let_go = let_go
        self._arrived: deque[tuple[str, int, int]] = deque()
        self._arrived_bytes = 0
        self._orders: deque[_Order] = deque()
        self._later: deque[_Order] = deque()
        self._under_way: list[tuple[_Order, str, list[int], int]] = []  # and the frame size
        self._timer: asyncio.TimerHandle | None = None
        self._counts = {f"{name}_{unit}": 0 for name in (_BY_PROFILE, _FROM_FRONT) for unit in _UNITS}

    def counters(self) -> dict[str, int]:
        """Runs asked for, frames, and bytes of content: for profiles, and `later` ones."""
        return dict(self._counts)

    def add(self, runs: Iterable[Run], fetched: set[tuple[str, int]], *, later: bool = False) -> None:
        """Fetch `runs` in their order, beside those of other trees; `fetched` gets the frames that were not here.

        `later`: nobody is known to need them, so they wait while there are others.
        """
        order = _Order(runs, fetched, _FROM_FRONT if later else _BY_PROFILE)
        (self._later if later else self._orders).append(order)
        if self._timer is None:
            self._go()

    def withdraw(self, fetched: set[tuple[str, int]]) -> None:
        """Ask for no more of what came with this very set; what is on its way arrives."""
        for order in (*self._orders, *self._later):
            if order.fetched is fetched:
                order.runs.clear()

    @property
    def busy(self) -> bool:
        """Whether anything is under way or waits for its turn."""
        return self._timer is not None

    def stop(self) -> None:
        """Ask for nothing more."""
        self._orders.clear()
        self._later.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _go(self) -> None:
        self._timer = None
        self._land()
        for _ in range(_LOOKS):
            orders = self._orders or self._later
            if not orders or len(self._under_way) >= _PARALLEL:
                break
            order = orders[0]
            if not order.runs:
                orders.popleft()
            elif not self._ask(order, order.runs[0]):
                break
            else:
                order.runs.popleft()
                orders.rotate(-1)  # trees take turns
        if self._orders or self._later or self._under_way:
            self._timer = self._loop.call_later(_TICK, self._go)

    def _land(self) -> None:
        """Let go of what has arrived, and give an order up of which nothing arrives, or stays."""
        flying = []
        for order, pack_id, frames, frame_size in self._under_way:
            if any(self._in_flight((pack_id, frame)) for frame in frames):
                flying.append((order, pack_id, frames, frame_size))
                continue
            order.failures = order.failures + 1 if all(self._is_absent(pack_id, frame) for frame in frames) else 0
            if order.failures >= _FAILURES:
                order.runs.clear()
            self._keep_for_readers(pack_id, frames[0] * frame_size, (frames[-1] + 1) * frame_size)
        self._under_way = flying

    def _keep_for_readers(self, pack_id: str, start: int, stop: int) -> None:
        """What has just arrived is likely to be read next; what did so before it leaves memory to others."""
        self._arrived.append((pack_id, start, stop))
        self._arrived_bytes += stop - start
        while self._arrived_bytes > self._budget.size // _KEPT_SHARE:
            oldest = self._arrived.popleft()
            self._arrived_bytes -= oldest[2] - oldest[1]
            self._let_go(*oldest)

    def _ask(self, order: _Order, run: Run) -> bool:
        """Fetch what is missing of a run; False when there is no memory to spare now."""
        try:
            table = self._writer.table(run.pack_id)
        except FloeError:
            table = None  # who reads it is told
        if table is None:
            return True
        numbers = range(run.first, min(run.stop, table.count))
        frames = [frame for frame in numbers if self._is_absent(run.pack_id, frame)]
        if not frames:
            return True
        lease = self._budget.try_lease(run.pack_id, sum(map(table.memory, frames)))
        if lease is None:
            return not self._budget.used  # then it will never fit
        self._fetch(run.pack_id, table, frames, lease)
        lease.drop()
        self._under_way.append((order, run.pack_id, frames, table.frame_size))
        order.fetched.update((run.pack_id, frame) for frame in frames)
        content = sum(table.content_length(frame) for frame in frames)
        for unit, amount in zip(_UNITS, (1, len(frames), content), strict=True):
            self._counts[f"{order.counted}_{unit}"] += amount
        return True
