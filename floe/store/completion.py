"""Fetching all that mounted trees need, behind everybody's back: demand, reading ahead and start-up profiles come first.

Part of a fetcher, in its event loop; the order of work comes from elsewhere. While somebody reads, an order that is `always`
has a request or two under way, any other none; a read joins what is on its way. What arrives counts as unread in the
cache: nothing is evicted for it, and it goes first, unless its order says otherwise. So work ends where the cache is full, and begins again when there is plenty of
room. A store or a disk that fails is left alone for longer and longer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from floe.store.budget import Budget, Lease
from floe.store.cache import Writer
from floe.store.cache.bitmap import runs
from floe.store.errors import FloeError
from floe.store.frames import FrameTable
from floe.store.replay import Run

_log = logging.getLogger(__name__)

_REQUEST = 4 << 20  # bytes of content in one request
_REQUEST_SHARE = 8  # of the budget, which may be small
_QUIET = 1.0  # seconds without a read that waits, and without reading ahead
_PARALLEL, _PARALLEL_BUSY = 8, 2  # requests, when it is quiet and when it is not
_SHARE, _SHARE_BUSY = 4, 16  # of the budget, likewise
_TICK, _TICK_WAITING = 0.01, 0.1  # seconds between two looks: with requests under way, and without
_TICK_FULL = 10.0  # seconds, when nothing but room is missing
_LOOKS = 64  # pieces looked at in one look, for all may be here
_REST_FIRST = 1.0  # seconds without a request after one brought nothing; doubled each time
_REST_MAX, _REST_MAX_STORE = 300.0, 60.0  # seconds, for the tree concerned and for all of them

WAITING, RUNNING, FULL, RESTING, DONE = "waiting", "running", "full", "resting", "done"
"""States of an order: waits for quiet or its turn, fetches, has no room in the cache or its share, lets the store rest."""


class Rest:
    """How long to leave something alone that failed: a second, twice as long each time, at most `longest` seconds."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._next = _REST_FIRST
        self.until = 0.0

    def fail(self, now: float) -> None:
        """It failed. What fails before the rest is over was begun before it, and is no news."""
        if now >= self.until:
            self.until = now + self._next
            self._next = min(self._next * 2, self._longest)

    def succeed(self) -> None:
        """It works."""
        self._next = _REST_FIRST


class Order:
    """What one tree needs: `runs` in order. `always`: also while somebody reads. `state` may be read from any thread.

    `evicts`: what was not used for longest goes for it, as for a read; else it waits for room.
    """

    def __init__(self, tree: str, runs: Iterable[Run], *, always: bool = False, evicts: bool = False) -> None:
        self.tree = tree
        self.runs = deque(runs)
        self.always = always
        self.evicts = evicts
        self.state = WAITING
        self.told = False  # the log knows that there is no room
        self.rest = Rest(_REST_MAX)

    def __repr__(self) -> str:
        return f"Order({self.tree[:12]}, {len(self.runs)} runs, {self.state})"


class Calls(NamedTuple):
    """What a fetcher does for this. Frames are named by pack and number.

    `is_absent`: neither here nor on its way. `is_pending`: on its way, or in memory and not in the cache yet. `is_busy`: whether
    anybody waits, or anything but these frames is on its way. `fetch` begins to fetch, to keep or as what goes first. `let_go` is told a pack and a range of
    content bytes that need not stay in memory for a reader. `recheck` hashes suspect frames in a thread, and raises nothing.
    """

    is_absent: Callable[[str, int], bool]
    is_pending: Callable[[str, int], bool]
    is_busy: Callable[[Iterable[tuple[str, int]]], bool]
    fetch: Callable[[str, FrameTable, list[int], Lease, bool], None]
    let_go: Callable[[str, int, int], object]
    recheck: Callable[[str, list[int]], asyncio.Future[None]]


class _UnderWay(NamedTuple):
    order: Order
    run: Run
    frames: list[int]
    memory: int
    frame_size: int
    checked: asyncio.Future[None] | None  # of frames that only have to be hashed


class Completer:
    """Works on orders, the first one first. `rate`: bytes as stored a second at most, 0 for no bound.

    All methods but `counters` belong to `loop`.
    """

    def __init__(
        self, writer: Writer, budget: Budget, loop: asyncio.AbstractEventLoop, calls: Calls, *, rate: int = 0
    ) -> None:
        self._writer = writer
        self._budget = budget
        self._loop = loop
        self._calls = calls
        self._rate = rate
        self._orders: list[Order] = []
        self._under_way: list[_UnderWay] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._busy_until = 0.0
        self._next_at = 0.0  # by the rate
        self._rest = Rest(_REST_MAX_STORE)
        self._counts = dict.fromkeys(("completion_requests", "completion_bytes", "completion_failures"), 0)

    def counters(self) -> dict[str, int]:
        """Requests, bytes as stored of what they brought, and requests that brought nothing."""
        return dict(self._counts)

    def work_on(self, orders: Sequence[Order]) -> None:
        """Work on these and no others, beginning with the first."""
        self._orders = list(orders)
        self._schedule(0.0)

    def touch(self) -> None:
        """Somebody waits for a read."""
        self._busy_until = self._loop.time() + _QUIET

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stopped = True
        self._orders.clear()
        if self._timer is not None:
            self._timer.cancel()

    # turns

    def _schedule(self, pause: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = self._loop.call_later(pause, self._go)

    def _go(self) -> None:
        self._timer = None
        try:
            self._turn()
        except Exception:
            _log.exception("completion goes on in a minute")
            self._schedule(_REST_MAX_STORE)

    def _turn(self) -> None:
        self._land()
        now = self._loop.time()
        if self._calls.is_busy((job.run.pack_id, frame) for job in self._under_way for frame in job.frames):
            self._busy_until = now + _QUIET
        looks = _LOOKS
        for order in self._orders:
            while order.runs and looks > 0 and self._begin_next(order, now):
                looks -= 1
            if not order.runs and order.state != DONE and not any(job.order is order for job in self._under_way):
                order.state = DONE
        left = [order for order in self._orders if order.state != DONE]
        if self._under_way or looks == 0:
            self._schedule(_TICK)
        elif left:
            wait = max(self._rest.until, self._next_at, min(order.rest.until for order in left)) - now
            usual = _TICK_FULL if all(order.state == FULL for order in left) else _TICK_WAITING
            self._schedule(max(wait, usual))

    def _begin_next(self, order: Order, now: float) -> bool:
        """Look at an order's next piece, and fetch what is missing of it; False when that is not for now."""
        if now < max(self._rest.until, order.rest.until):
            order.state = RESTING
            return False
        busy = now < self._busy_until
        if busy and not order.always:
            order.state = WAITING
            return False
        if now < self._next_at or len(self._under_way) >= (_PARALLEL_BUSY if busy else _PARALLEL):
            return False
        run = order.runs[0]
        try:
            table = self._writer.table(run.pack_id)
        except FloeError:
            table = None  # who reads it is told
        if table is None or run.first >= table.count:
            order.runs.popleft()
            return True
        most = min(_REQUEST, self._budget.size // _REQUEST_SHARE, self._rate or _REQUEST)
        stop = min(run.stop, table.count, run.first + max(1, most // table.frame_size))
        piece = Run(run.pack_id, run.first, stop)
        taken = self._ask(order, piece, table, busy=busy)
        if taken and stop < min(run.stop, table.count):
            order.runs[0] = Run(run.pack_id, stop, run.stop)
        elif taken:
            order.runs.popleft()
        return taken

    def _ask(self, order: Order, run: Run, table: FrameTable, *, busy: bool) -> bool:
        """Fetch what is missing of a piece, or hash what is suspect; False: not now."""
        pack = self._writer.pack(run.pack_id)
        if pack is None:
            return True
        if pack.bits.covers(run.first, run.stop - 1):
            return True
        numbers = range(run.first, run.stop)
        suspect = [frame for frame in numbers if pack.bits.is_suspect(frame)]
        if suspect:
            checked = self._calls.recheck(run.pack_id, suspect)
            self._under_way.append(_UnderWay(order, run, suspect, 0, table.frame_size, checked))
            order.state = RUNNING
            return True
        frames = [frame for frame in numbers if self._calls.is_absent(run.pack_id, frame)]
        if not frames:
            return True
        coming = sum(len(job.frames) * job.frame_size for job in self._under_way)
        if not order.evicts and not self._has_room(order, run.pack_id, coming + len(frames) * table.frame_size):
            return False
        memory = sum(map(table.memory, frames))
        held = sum(job.memory for job in self._under_way)
        if held and held + memory > self._budget.size // (_SHARE_BUSY if busy else _SHARE):
            return False
        lease = self._budget.try_lease(run.pack_id, memory)
        if lease is None:
            return memory > self._budget.size // 2  # then it will never fit
        self._calls.fetch(run.pack_id, table, frames, lease, order.evicts)
        lease.drop()
        self._under_way.append(_UnderWay(order, run, frames, memory, table.frame_size, None))
        stored = sum(table.stored_range(frame)[1] for frame in frames)
        if self._rate:
            self._next_at = max(self._next_at, self._loop.time()) + stored / self._rate
        order.state = RUNNING
        self._counts["completion_requests"] += 1
        self._counts["completion_bytes"] += stored
        return True

    def _has_room(self, order: Order, pack_id: str, need: int) -> bool:
        room = self._writer.room(pack_id)
        if room.free >= need + room.reserve and (order.state != FULL or room.is_plenty):
            order.told = False
            return True
        order.state = FULL
        if not order.told:
            order.told = True
            what = f"the share of model {room.share} of the node cache" if room.share else "the node cache"
            _log.info("tree %s is not completed: %s is full; reads go on as before", order.tree, what)
        return False

    def _land(self) -> None:
        """See what has arrived and is in the cache; what did not, is asked for again."""
        jobs, self._under_way = self._under_way, []
        for job in jobs:
            pack_id, frames, size = job.run.pack_id, job.frames, job.frame_size
            if job.checked is not None:
                if not job.checked.done():
                    self._under_way.append(job)
                    continue
                job.order.runs.appendleft(job.run)  # what turned out damaged is absent now
                pack = self._writer.pack(pack_id)
                if pack is not None and any(map(pack.bits.is_suspect, frames)):
                    self._fail(job.order)
                continue
            for first, count in runs(frames):
                self._calls.let_go(pack_id, first * size, (first + count) * size)
            if any(self._calls.is_pending(pack_id, frame) for frame in frames):
                self._under_way.append(job)
                continue
            missing = [frame for frame in frames if self._calls.is_absent(pack_id, frame)]
            if not missing:
                self._rest.succeed()
                job.order.rest.succeed()
                continue
            job.order.runs.appendleft(job.run)
            if len(missing) == len(frames):
                self._fail(job.order)

    def _fail(self, order: Order) -> None:
        self._counts["completion_failures"] += 1
        self._rest.fail(self._loop.time())
        order.rest.fail(self._loop.time())
