"""From the object store to readers: each frame once, in few requests, verified, within a memory budget.

An event loop in a thread of its own owns all state here; hashing, decompression and the cache's disk run in a
few threads (delivery.py), answers go out from two more. A read first gets memory for all its frames (budget.py), then joins
frames that are being fetched, reads those in the cache, and asks for the rest: adjacent ones, of all reads that
arrived together, in one request (requests.py). A frame that arrives is verified, handed to its readers, and stored behind their
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

from cachetools import LRUCache

from floe.store.ahead import Ahead
from floe.store.around import Around
from floe.store.budget import Budget, Lease
from floe.store.cache import Writer
from floe.store.completion import Calls, Completer, Order
from floe.store.delivery import COUNTED
from floe.store.errors import (
    BadInputError,
    CancelledError,
    DiskError,
    FloeError,
    UnavailableError,
)
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import Buffer
from floe.store.lostindexes import LostIndexes
from floe.store.objects.base import ObjectStore
from floe.store.onhand import Held, OnHand
from floe.store.reading import Done, Flight, Get, Read, read_local
from floe.store.replay import Replayer, Run
from floe.store.requests import GET_MAX, Requests
from floe.store.writebehind import WriteBehind

_log = logging.getLogger(__name__)

DAMAGE_MEMORY = 60.0  # seconds
_SEEK_PAUSE = 0.05  # seconds
_KEPT_SHARE = 8  # of the budget, for frames the cache could not keep: a fault reads 64 KiB of 1 MiB
_LOCALS, _REPLIERS = 4, 2  # threads
_COUNTED = ("deadlines", "cancelled", "failed_reads")


class Fetcher:
    """Reads of packs of `store` through the cache of `writer`. Public methods are thread-safe, but for those of requests.Readers.

    `readahead`: largest window in bytes (0: none). `deadline`: seconds for a read. `budget`: bytes of memory for data on
    its way. `store` retries passing faults itself or not; `damage_memory` seconds is how long damage is believed in.
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
    ) -> None:
        self._url = store.url
        self._writer = writer
        self._deadline = deadline
        kept = budget // _KEPT_SHARE
        self._budget = Budget(budget - kept)
        self._kept: LRUCache[tuple[str, int], VerifiedFrame] = LRUCache(kept, getsizeof=len)
        self._reads: set[Read] = set()
        self._ready: list[Read] = []
        self._counts = dict.fromkeys((*COUNTED, *_COUNTED), 0)
        self._locals = ThreadPoolExecutor(_LOCALS, thread_name_prefix="floe-local")
        self._repliers = ThreadPoolExecutor(_REPLIERS, thread_name_prefix="floe-reply")
        self._closed = False
        self._seeking = False  # for memory
        self._lock = threading.Lock()  # orders submit and close
        self._loop = asyncio.new_event_loop()
        self.on_hand = OnHand(self._loop.time, self._loop.call_later)
        self._requests = Requests(store, self._counts, self._loop, self, self.on_hand, damage_memory=damage_memory)
        self.known_damage = self._requests.known_damage
        self._lost = LostIndexes(store, writer, self._loop, self._locals, deadline=deadline)
        self._around = Around(writer, self._loop, self._read_disk)
        self._behind = WriteBehind(writer, self._tell, self._written)
        self._ahead = Ahead(
            readahead,
            writer,
            self._budget,
            self.on_hand,
            is_absent=self._is_worth_fetching,
            fetch=self._requests.ahead,
            give_up=self._requests.give_up,
            loop=self._loop,
        )
        self.marks = self._ahead.marks
        self._replayer = Replayer(
            writer,
            self._budget,
            self._loop,
            is_absent=self._is_absent,
            in_flight=self._requests.__contains__,
            fetch=functools.partial(self._requests.ahead, streamed=False),
        )
        calls = Calls(
            self._is_absent, self._is_pending, self._is_busy, self._complete, self.on_hand.passed, self._recheck
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
            if not self._closed:
                self._loop.call_soon_threadsafe(call, *args)
            return not self._closed

    def counters(self) -> dict[str, int]:
        """Totals since the start, and what is under way now (`reads`, `memory_bytes`, `memory_waiting`)."""
        return {
            **self._counts,
            **self._replayer.counters(),
            **self._completer.counters(),
            "reads": len(self._reads),
            "memory_bytes": self._budget.used,
            "memory_peak_bytes": self._budget.peak,
            "skipped_frames": self.on_hand.skipped,
            "streams_left": self._ahead.left,
            "around_reads": self._around.reads,
            "around_returned": self._around.returned,
        }

    def close(self) -> None:
        """End outstanding reads with CancelledError, and all threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
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
            self._finish(read, CancelledError("the pack reader was stopped"))
        await self._lost.stop()
        await self._requests.stop()
        self.on_hand.close()

    # reads

    def _start(self, read: Read) -> None:
        self._reads.add(read)
        self._completer.touch()
        read.timer = self._loop.call_later(self._deadline, self._expire, read)
        try:
            table = self._writer.table(read.pack_id)
        except DiskError:
            table = None  # the store has it too
        except FloeError as error:
            self._finish(read, error)
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
            self._finish(read, table)

    def _begin(self, read: Read, table: FrameTable) -> None:
        read.table = table
        if read.length <= 0 or read.offset < 0 or read.offset + read.length > table.content_size:
            self._finish(read, BadInputError(f"{read.what} were asked for, it has {table.content_size}"))
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
        read.lease = lease
        if not self._ready:
            self._loop.call_soon(self._plan)  # with whatever else arrives in this turn of the loop
        self._ready.append(read)

    def _plan(self) -> None:
        """Join, look up or ask for every frame of the reads that got their memory."""
        reads, self._ready = [r for r in self._ready if not r.finished], []
        self._fetch_missing(reads, {read: list(read.frames) for read in reads}, local=True)
        for read in reads:
            # Whole frames: smaller reads that follow in a frame are answered by the cache, and not seen here.
            if read.table is not None and not self._closed:
                size = read.table.frame_size
                self._ahead.look(read.pack_id, read.frames.start * size, len(read.frames) * size, waited=True)

    def _fetch_missing(self, reads: list[Read], frames: dict[Read, list[int]], *, local: bool) -> None:
        fresh: dict[str, list[Flight]] = {}
        try:
            self._join_or_ask(reads, frames, fresh, local=local)
        except Exception as problem:
            # Nobody may be left waiting for a flight that was not sent.
            _log.exception("reads could not be begun")
            error = UnavailableError(f"the read could not be begun: {problem!r}")
            for read in reads:
                self._finish(read, error)
            for pack_id, flights in fresh.items():
                for flight in flights:
                    if flight.get is None:
                        self._requests.land(pack_id, flight, error)

    def _join_or_ask(
        self, reads: list[Read], frames: dict[Read, list[int]], fresh: dict[str, list[Flight]], *, local: bool
    ) -> None:
        for read in reads:
            here: list[int] = []
            read.began, read.fresh = self._loop.time(), True
            for frame in frames[read]:
                if read.finished:
                    break
                self._join(read, frame, fresh, here if local else None)
            read.fresh = read.fresh and not here
            if here and not read.finished:
                self._locals.submit(self._read_local, read, here)
        for pack_id, flights in fresh.items():
            for flight in flights:
                if not flight.waiters:  # its read came to an end over another frame
                    self._requests.drop(pack_id, flight)
            wanted = [flight for flight in flights if flight.waiters]
            table = next((read.table for flight in wanted for read in flight.waiters), None)
            if table is not None:
                self._requests.send(pack_id, table, wanted, ahead=False)

    def _join(self, read: Read, frame: int, fresh: dict[str, list[Flight]], here: list[int] | None) -> None:
        key = (read.pack_id, frame)
        flight = self._requests.flights.get(key)
        local = here is not None and self._is_local(*key)
        if flight is not None:
            read.fresh = False
            if flight.frame is not None:
                self.give(read, frame, flight.frame.content, flight.get)
                return
        elif (held := self.on_hand.find(*key)) is not None:
            assert held.frame is not None
            read.fresh = False
            self.give(read, frame, held.frame.content, held.get)
            self.has_read(read, held)
            return
        elif key in self._kept:
            read.fresh = False
            self.give(read, frame, self._kept[key].content, None)
            return
        # Asked once: it may be forgotten in between.
        elif (damage := self._requests.damages.get(key)) is not None and not local:
            self._finish(read, damage)
            return
        elif here is not None and local and (damage is not None or not self._around.is_taken(read.pack_id)):
            here.append(frame)
            return
        else:
            flight = self._requests.begin(*key)
            fresh.setdefault(read.pack_id, []).append(flight)
        if flight.get is not None:
            flight.get.unread = False
        flight.waiters.add(read)
        read.flights[frame] = flight
        if local:
            self._around.begin(read)

    def _is_local(self, pack_id: str, frame: int) -> bool:
        pack = self._writer.pack(pack_id)
        return pack is not None and (pack.bits.is_trusted(frame) or pack.bits.is_suspect(frame))

    def _read_local(self, read: Read, frames: list[int]) -> None:
        """In a thread: what is wanted of frames on the cache's disk, hashed if need be; those that fail are left out."""
        found: dict[int, Buffer] = {}
        try:
            for frame in frames:
                piece = read_local(self._writer, read, frame)
                if piece is not None:
                    found[frame] = piece
        except Exception:
            _log.exception("frames of pack %s could not be read from the cache", read.pack_id)
        self._tell(self._local_done, read, frames, found)

    def _read_disk(self, read: Read, frames: list[int]) -> None:
        """Read frames that are being fetched, too, from the cache's disk, where they are there."""
        here = [frame for frame in frames if self._is_local(read.pack_id, frame)]
        if here and not self._closed:
            read.returning.update(here)
            self._locals.submit(self._read_local, read, here)

    def _local_done(self, read: Read, frames: list[int], found: dict[int, Buffer]) -> None:
        read.returning.difference_update(frames)
        for frame, piece in found.items():
            if read.finished or frame in read.pieces:
                continue
            flight = read.flights.get(frame)
            if flight is not None:
                flight.waiters.discard(read)
            if read.keep(frame, piece):
                self._finish(read, None)
            if flight is not None and flight.get is not None and not flight.get.ahead:
                self._requests.give_up(flight.get)
        missing = [f for f in frames if f not in found and f not in read.flights and f not in read.pieces]
        if missing and not read.finished:
            self._fetch_missing([read], {read: missing}, local=False)

    def _expire(self, read: Read) -> None:
        self._counts["deadlines"] += 1
        self._finish(read, read.overdue(self._url, self._deadline))

    def _cancel(self, read: Read) -> None:
        if not read.finished:
            self._counts["cancelled"] += 1
            self._finish(read, CancelledError("the reader went away"))

    def _finish(self, read: Read, error: FloeError | None) -> None:
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

    def _reply(self, read: Read, error: FloeError | None) -> None:
        try:
            read.done(read.result() if error is None else error)
        except Exception:
            _log.exception("an answer for pack %s could not be delivered", read.pack_id)
        self._tell(read.release)

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        """Run `call` in the loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(call, *args)

    # from requests

    def give(self, read: Read, frame: int, content: Buffer, get: Get | None) -> None:
        """See Readers.give."""
        if not read.finished and read.take(frame, content, get):
            self._finish(read, None)

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
        self._finish(read, error)

    def took(self, seconds: float) -> None:
        """See Readers.took."""
        self._ahead.took(seconds)

    def landed(self, batch: list[Held]) -> None:
        """See Readers.landed."""
        if not self._closed:
            self._behind.add(batch)

    # ahead

    def _hit(self, pack_id: str, offset: int, length: int) -> None:
        if not self._closed:
            self._ahead.look(pack_id, offset, length, waited=False)

    def _is_absent(self, pack_id: str, frame: int) -> bool:
        key = (pack_id, frame)
        if key in self._requests or key in self._requests.damages or self.on_hand.find(*key) is not None:
            return False
        return not self._is_local(pack_id, frame)

    def _is_worth_fetching(self, pack_id: str, frame: int) -> bool:
        """As `_is_absent`, but what is on a disk that reads go around counts as absent."""
        if not self._around.is_taken(pack_id):
            return self._is_absent(pack_id, frame)
        return not self._is_pending(pack_id, frame) and (pack_id, frame) not in self._requests.damages

    # completion

    def _complete(self, pack_id: str, table: FrameTable, frames: list[int], lease: Lease) -> None:
        """Fetch frames for nobody in particular."""
        for get in self._requests.ahead(pack_id, table, frames, lease):
            get.unread = True

    def _is_pending(self, pack_id: str, frame: int) -> bool:
        return (pack_id, frame) in self._requests or self.on_hand.find(pack_id, frame) is not None

    def _is_busy(self, own: Iterable[tuple[str, int]]) -> bool:
        return bool(self._reads) or len(self._requests.flights) > sum(key in self._requests for key in own)

    def _recheck(self, pack_id: str, frames: list[int]) -> asyncio.Future[None]:
        def check() -> None:
            with contextlib.suppress(FloeError):
                for frame in frames:
                    self._writer.recheck(pack_id, frame)

        return self._loop.run_in_executor(self._locals, check)

    def _written(self, batch: list[Held], lost: list[tuple[Held, VerifiedFrame]]) -> None:
        """See WriteBehind."""
        if batch and self._around.is_taken(batch[0].get.pack_id):
            lost = [(held, frame) for held in batch if (frame := held.frame) is not None]
        for held, frame in lost:
            if not held.get.streamed:
                with contextlib.suppress(ValueError):  # larger than all that may be kept
                    self._kept[held.get.pack_id, held.number] = frame
        self.on_hand.settle(batch)
