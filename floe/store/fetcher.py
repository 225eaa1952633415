"""From the object store to readers: each frame once, in few requests, verified, within a memory budget.

An event loop in a thread of its own owns all state here; hashing, decompression and the cache's disk run in a
few threads (delivery.py), answers go out from two more. A read first gets memory for all its frames (budget.py), then the
frames themselves from wherever they are (gathering.py), of the store those of all reads that arrived together, adjacent ones in one
request (requests.py). A frame that arrives is verified, handed to its readers, and stored behind their
backs (writebehind.py); until it is, and until a stream that it was fetched for has had it, it stays in memory (onhand.py).

A frame that is damaged at rest (delivery.py) is remembered for a minute, and its readers get DamagedError.
A store that cannot be reached is tried until the reads that wait have come to their deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from floe.store.ahead import Ahead
from floe.store.budget import Budget, Lease
from floe.store.cache import Writer
from floe.store.completion import Calls, Completer, Order
from floe.store.delivery import COUNTED
from floe.store.errors import (
    BadInputError,
    CancelledError,
    DiskError,
    FloeError,
)
from floe.store.frames import FrameTable
from floe.store.gathering import Gatherer
from floe.store.ids import Buffer
from floe.store.lostindexes import LostIndexes
from floe.store.objects.base import ObjectStore
from floe.store.onhand import Held, OnHand
from floe.store.reading import Done, Flight, Get, Read
from floe.store.replay import Replayer, Run
from floe.store.requests import GET_MAX, Requests
from floe.store.threads import started_pool
from floe.store.waits import Stall, Waits
from floe.store.writebehind import WriteBehind

_log = logging.getLogger(__name__)

DAMAGE_MEMORY = 60.0  # seconds
_SEEK_PAUSE = 0.05  # seconds
_KEPT_SHARE = 8  # of the budget, for frames the cache could not keep: a fault reads 64 KiB of 1 MiB
_LOCALS, _REPLIERS = 4, 2  # threads
_COUNTED = ("deadlines", "cancelled", "failed_reads")


class Fetcher:
    """Reads of packs of `store` through the cache of `writer`. Public methods are thread-safe, but for those of gathering.Reads.

    `readahead`: largest window in bytes (0: none). `deadline`: seconds for a read. `budget`: bytes of memory for data on
    its way. `store` retries passing faults itself or not; `damage_memory` seconds is how long damage is believed in.
    `stalled` is told of reads that took long, see Waits.
    """

    def __init__(
        self,
        store: ObjectStore,
        writer: Writer,
        *,
        readahead: int = 0,
        deadline: float = 300.0,
        budget: int = 256 << 20,
        damage_memory: float = DAMAGE_MEMORY,
        completion_rate: int = 0,
        stalled: Callable[[Stall], object] = lambda _stall: None,
    ) -> None:
        self._url = store.url
        self._writer = writer
        self._deadline = deadline
        self._budget = Budget(budget - budget // _KEPT_SHARE)
        self._reads: set[Read] = set()
        self._ready: list[Read] = []
        self._counts = dict.fromkeys((*COUNTED, *_COUNTED), 0)
        self._locals = ThreadPoolExecutor(_LOCALS, thread_name_prefix="floe-local")
        self._repliers = started_pool(_REPLIERS, "floe-reply")
        self.closed = False
        self._seeking = False  # for memory
        self._lock = threading.Lock()  # orders submit and close
        self._loop = asyncio.new_event_loop()
        self.on_hand = OnHand(self._loop.time, self._loop.call_later)
        self._waits = Waits(self._loop.time, stalled)
        self._requests = Requests(store, self._counts, self._loop, self, self.on_hand, damage_memory=damage_memory)
        self.known_damage = self._requests.known_damage
        self._lost = LostIndexes(store, writer, self._loop, self._locals, deadline=deadline)
        self._gatherer = Gatherer(
            self,
            writer,
            self._requests,
            self.on_hand,
            loop=self._loop,
            threads=self._locals,
            kept=budget // _KEPT_SHARE,
        )
        self._around = self._gatherer.around
        self._behind = WriteBehind(writer, self.tell, self._gatherer.written)
        self._ahead = Ahead(
            readahead,
            writer,
            self._budget,
            self.on_hand,
            is_absent=self._gatherer.is_worth_fetching,
            fetch=self._requests.ahead,
            give_up=self._requests.give_up,
            loop=self._loop,
        )
        self.marks = self._ahead.marks
        self._replayer = Replayer(
            writer,
            self._budget,
            self._loop,
            is_absent=self._gatherer.is_absent,
            in_flight=self._requests.__contains__,
            fetch=functools.partial(self._requests.ahead, streamed=False),
        )
        calls = Calls(
            self._gatherer.is_absent,
            self._gatherer.is_pending,
            self._is_busy,
            self._complete,
            self.on_hand.passed,
            self._recheck,
        )
        self._completer = Completer(writer, self._budget, self._loop, calls, rate=completion_rate)
        self._thread = threading.Thread(target=self._loop.run_forever, name="floe-fetch", daemon=True)
        self._thread.start()

    # from other threads

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Read:
        """Begin a read; `done` is called once, from another thread, with its pieces in order or the error."""
        read = Read(self, pack_id, offset, length, done)
        if not self._begin_soon(self._start, read):
            error = CancelledError("the pack reader was stopped")
            threading.Thread(target=done, args=(error,), name="floe-reply", daemon=True).start()
        return read

    def cancel(self, read: Read) -> None:
        """See Read.cancel."""
        self._begin_soon(self._cancel, read)

    def hit(self, pack_id: str, offset: int, length: int) -> None:
        """Cache or memory answered a read that touches one of `marks`."""
        self._begin_soon(self._hit, pack_id, offset, length)

    def replay(self, runs: Iterable[Run], fetched: set[tuple[str, int]], *, later: bool = False) -> None:
        """See Replayer.add."""
        self._begin_soon(functools.partial(self._replayer.add, runs, fetched, later=later))

    def stop_replay(self, fetched: set[tuple[str, int]]) -> None:
        """See Replayer.withdraw."""
        self._begin_soon(self._replayer.withdraw, fetched)

    def complete(self, orders: Sequence[Order]) -> None:
        """See Completer.work_on."""
        self._begin_soon(self._completer.work_on, orders)

    def _begin_soon(self, call: Callable[..., object], *args: object) -> bool:
        """Run `call` in the loop; False once closing has begun."""
        with self._lock:
            if not self.closed:
                self._loop.call_soon_threadsafe(call, *args)
            return not self.closed

    def counters(self) -> dict[str, int]:
        """Totals since the start, and what is under way now (`reads`, `memory_bytes`, `memory_waiting`)."""
        return {
            **self._counts,
            **self._replayer.counters(),
            **self._completer.counters(),
            "reads": len(self._reads),
            "memory_bytes": self._budget.used,
            "memory_peak_bytes": self._budget.peak,
            "memory_waiting": sum(read.lease is None and read.asked is not None for read in list(self._reads)),
            "skipped_frames": self.on_hand.skipped,
            "streams_left": self._ahead.left,
            "around_reads": self._around.reads,
            "around_returned": self._around.returned,
        }

    def status(self) -> dict[str, Any]:
        """What Waits says, `store_errors` by cause, and `requests_in_flight`."""
        return {
            **self._waits.status(),
            "store_errors": dict(self._requests.errors),
            "requests_in_flight": self._requests.under_way,
        }

    def close(self) -> None:
        """End outstanding reads with CancelledError, and all threads."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._requests.close()
        self._locals.shutdown(cancel_futures=True)
        self._behind.close()
        # What the pools told the loop at last, such as memory given back, still runs.
        self._repliers.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._replayer.stop()
        self._ahead.stop()
        self._completer.stop()
        for read in list(self._reads):
            self.finish(read, CancelledError("the pack reader was stopped"))
        await self._lost.stop()
        await self._requests.stop()
        self.on_hand.close()

    # reads

    def _start(self, read: Read) -> None:
        self._reads.add(read)
        read.submitted = self._loop.time()
        self._completer.touch()
        read.timer = self._loop.call_later(self._deadline, self._expire, read)
        try:
            table = self._writer.table(read.pack_id)
        except DiskError:
            table = None  # the store has it too
        except FloeError as error:
            self.finish(read, error)
            return
        if table is None:
            self._lost.fetch(read.pack_id, lambda found: self._found(read, found))
        else:
            self._begin(read, table)

    def _found(self, read: Read, table: FrameTable | FloeError) -> None:
        """The store's answer for an index that is on this node no more."""
        if read.finished:
            return
        if isinstance(table, FrameTable):
            self._begin(read, table)
        elif table.retryable:  # the deadline was that of a read which asked before
            self._lost.fetch(read.pack_id, lambda found: self._found(read, found))
        else:
            self.finish(read, table)

    def _begin(self, read: Read, table: FrameTable) -> None:
        read.table, read.indexed = table, self._loop.time()
        if read.length <= 0 or read.offset < 0 or read.offset + read.length > table.content_size:
            self.finish(read, BadInputError(f"{read.what} were asked for, it has {table.content_size}"))
            return
        size = table.frame_size
        read.frames = range(read.offset // size, (read.offset + read.length - 1) // size + 1)
        need = sum(table.memory(frame) for frame in read.frames)
        read.asked = self._budget.ask(read.pack_id, need, lambda lease: self._granted(read, lease))
        if read.lease is None and not self._seeking:
            self._seek_memory()

    def _seek_memory(self) -> None:
        """While reads wait for memory, take it from frames that may go, again and again: the disk may hang."""
        self._seeking = self._budget.waiting > 0
        if self._seeking:
            self.on_hand.make_room(GET_MAX)
            self._loop.call_later(_SEEK_PAUSE, self._seek_memory)

    def _granted(self, read: Read, lease: Lease) -> None:
        if read.finished:
            lease.drop()
            return
        read.lease, read.granted = lease, self._loop.time()
        if not self._ready:
            self._loop.call_soon(self._plan)  # with whatever else arrives in this turn of the loop
        self._ready.append(read)

    def _plan(self) -> None:
        """Get the frames of the reads that got their memory."""
        reads, self._ready = [r for r in self._ready if not r.finished], []
        self._gatherer.gather(reads)
        for read in reads:
            # Whole frames: smaller reads that follow in a frame are answered by the cache, and not seen here.
            if read.table is not None and not self.closed:
                size = read.table.frame_size
                self._ahead.look(read.pack_id, read.frames.start * size, len(read.frames) * size, waited=True)

    def _expire(self, read: Read) -> None:
        self._counts["deadlines"] += 1
        self.finish(read, read.overdue(self._url, self._deadline))

    def _cancel(self, read: Read) -> None:
        if not read.finished:
            self._counts["cancelled"] += 1
            self.finish(read, CancelledError("the reader went away"))

    def finish(self, read: Read, error: FloeError | None) -> None:
        """Answer a read (None: with its pieces); requests that nobody waits for any more end."""
        if read.finished:
            return
        read.finished = True
        self._around.finished(read, well=error is None)
        self._reads.discard(read)
        if read.timer is not None:
            read.timer.cancel()
        if read.asked is not None:
            read.asked.withdrawn = True
        gets = set()
        for flight in read.flights.values():
            flight.waiters.discard(read)
            if flight.get is not None:
                gets.add(flight.get)
        read.flights.clear()
        for get in gets:
            if not get.ahead:
                self._requests.give_up(get)
        if error is not None:
            self._counts["failed_reads"] += not isinstance(error, CancelledError)
        self._repliers.submit(self._reply, read, error)
        # Last: what is told of a read must not be able to keep its answer back.
        try:
            self._waits.finished(read, error)
        except Exception:
            _log.exception("what a read of pack %s waited for is not told", read.pack_id)

    def _reply(self, read: Read, error: FloeError | None) -> None:
        try:
            read.done(read.result() if error is None else error)
        except Exception:
            _log.exception("an answer for pack %s could not be delivered", read.pack_id)
        self.tell(read.release)

    def tell(self, call: Callable[..., object], *args: object) -> None:
        """Run `call` in the loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(call, *args)

    # from requests

    def give(self, read: Read, frame: int, content: Buffer, get: Get | None) -> None:
        """See Readers.give."""
        if not read.finished:
            read.source = get
            if read.take(frame, content, get):
                self.finish(read, None)

    def has_read(self, read: Read, held: Held) -> None:
        """See Readers.has_read."""
        table = held.get.table
        if read.part(held.number)[1] == held.number * table.frame_size + table.content_length(held.number):
            self.on_hand.read(held)

    def lose(self, read: Read, flight: Flight, error: FloeError) -> None:
        """See Readers.lose."""
        if not isinstance(error, CancelledError):
            self._around.give_up(read)
            if flight.number in read.returning:
                read.flights.pop(flight.number, None)
                flight.waiters.discard(read)
                return
        self.finish(read, error)

    def took(self, get: Get) -> None:
        """See Readers.took."""
        self._waits.requested(get)
        if get.streamed and not get.unread:
            self._ahead.took(self._loop.time() - get.began)

    def landed(self, batch: list[Held]) -> None:
        """See Readers.landed."""
        if not self.closed:
            self._behind.add(batch)

    # ahead

    def _hit(self, pack_id: str, offset: int, length: int) -> None:
        if not self.closed:
            self._ahead.look(pack_id, offset, length, waited=False)

    # completion

    def _complete(self, pack_id: str, table: FrameTable, frames: list[int], lease: Lease, keep: bool) -> None:  # noqa: FBT001 - see Calls
        """Fetch frames for nobody in particular; unless to `keep`, they are the first to go."""
        for get in self._requests.ahead(pack_id, table, frames, lease):
            get.unread = not keep

    def _is_busy(self, own: Iterable[tuple[str, int]]) -> bool:
        return bool(self._reads) or len(self._requests.flights) > sum(key in self._requests for key in own)

    def _recheck(self, pack_id: str, frames: list[int]) -> asyncio.Future[None]:
        def check() -> None:
            with contextlib.suppress(FloeError):
                for frame in frames:
                    self._writer.recheck(pack_id, frame)

        return self._loop.run_in_executor(self._locals, check)
