"""Frames on their way from the store: adjacent ones in one request, each handed to the reads that wait for it.

Part of a fetcher, in its event loop. A request lives as long as a read wants any of its frames; one that was made ahead of
readers lives until it is given up. What arrives is on hand (onhand.py) until it is written (writebehind.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from cachetools import TTLCache

from floe.store.budget import Lease
from floe.store.damage import KnownDamage
from floe.store.delivery import Delivery
from floe.store.errors import (
    CancelledError,
    DamagedError,
    FloeError,
    NotFoundError,
    StoreMissingError,
    UnavailableError,
)
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.onhand import Held, OnHand
from floe.store.reading import Flight, Get, Read

_log = logging.getLogger(__name__)

GET_MAX = 8 << 20  # bytes of content in one request: best throughput of S3, and still many to share the budget


class Readers(Protocol):
    """Who waits for frames; called in the event loop."""

    def give(self, read: Read, frame: int, content: Buffer, get: Get | None) -> None:
        """A frame that a read waits for is here."""
        ...

    def has_read(self, read: Read, held: Held) -> None:
        """A read got a frame that is on hand."""
        ...

    def lose(self, read: Read, flight: Flight, error: FloeError) -> None:
        """A frame that a read waits for will not come this way."""
        ...

    def took(self, get: Get) -> None:
        """A request ended well."""
        ...

    def landed(self, batch: list[Held]) -> None:
        """A request ended; these of its frames are on hand."""
        ...


class Requests:
    """Requests to `store` on behalf of `readers` in `loop`, counted in `counts` (keys delivery.COUNTED).

    `damage_memory`: seconds for which damage at rest is believed in.
    """

    def __init__(
        self,
        store: ObjectStore,
        counts: dict[str, int],
        loop: asyncio.AbstractEventLoop,
        readers: Readers,
        on_hand: OnHand,
        *,
        damage_memory: float,
    ) -> None:
        self._loop = loop
        self._readers = readers
        self._on_hand = on_hand
        self._delivery = Delivery(store, counts, loop, self)
        self._tasks: set[asyncio.Task[None]] = set()
        self.flights: dict[tuple[str, int], Flight] = {}
        self.damages: TTLCache[tuple[str, int], DamagedError] = TTLCache(4096, damage_memory)
        self.known_damage = KnownDamage()

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether a frame, (pack, number), is under way."""
        return key in self.flights

    @property
    def errors(self) -> dict[str, int]:
        """Requests that failed, by cause; see errorkinds.kind_of."""
        return self._delivery.errors

    @property
    def under_way(self) -> int:
        """How many requests have not ended."""
        return len(self._tasks)

    def begin(self, pack_id: str, frame: int) -> Flight:
        """A frame that is to be asked for, now, by `send`."""
        flight = self.flights[pack_id, frame] = Flight(frame)
        return flight

    def drop(self, pack_id: str, flight: Flight) -> None:
        """A frame that was begun is not to be asked for."""
        del self.flights[pack_id, flight.number]

    def send(
        self,
        pack_id: str,
        table: FrameTable,
        flights: list[Flight],
        *,
        ahead: bool,
        streamed: bool = False,
        lease: Lease | None = None,
    ) -> list[Get]:
        """Turn new flights into requests, adjacent ones together; see Get."""
        flights.sort(key=lambda f: f.number)
        most = max(1, GET_MAX // table.frame_size)
        run: list[Flight] = []
        gets = []
        for flight in flights:
            if run and (flight.number != run[-1].number + 1 or len(run) >= most):
                gets.append(self._begin(pack_id, table, run, lease, ahead=ahead, streamed=streamed))
                run = []
            run.append(flight)
        if run:
            gets.append(self._begin(pack_id, table, run, lease, ahead=ahead, streamed=streamed))
        return gets

    def _begin(
        self,
        pack_id: str,
        table: FrameTable,
        run: list[Flight],
        lease: Lease | None,
        *,
        ahead: bool,
        streamed: bool,
    ) -> Get:
        leases = list({id(r.lease): r.lease for f in run for r in f.waiters if r.lease is not None}.values())
        if lease is not None:
            leases.append(lease)
        for held in leases:
            held.hold()
        get = Get(pack_id, table, run, leases, ahead=ahead, streamed=streamed)
        get.began = self._loop.time()
        get.task = self._loop.create_task(self._delivery.run(get))
        self._tasks.add(get.task)
        get.task.add_done_callback(lambda task: self._ended(get, task))
        return get

    def _ended(self, get: Get, task: asyncio.Task[None]) -> None:
        """Also when the task was cancelled before its first step: nothing may be left waiting."""
        self._tasks.discard(task)
        error: FloeError | None = None
        if not task.cancelled() and task.exception() is None:
            self._readers.took(get)
        if not task.cancelled() and task.exception() is not None:
            problem = task.exception()
            if isinstance(problem, FloeError):
                error = problem
            else:
                _log.error("fetching from pack %s failed", get.pack_id, exc_info=problem)
                error = UnavailableError(f"fetching from pack {get.pack_id} failed: {problem!r}")
        gone = isinstance(error, NotFoundError) and not isinstance(error, StoreMissingError)
        # A read that joined it as it failed has a deadline of its own, and is asked for anew.
        anew = error is not None and error.retryable and get.ahead
        again: list[Flight] = []
        for flight in get.frames:
            if gone and flight.frame is None:  # what came before that was good
                self.known_damage.add(get.pack_id, flight.number, time.time())
            if anew and flight.waiters and self.flights.get((get.pack_id, flight.number)) is flight:
                again.append(flight)
            else:
                self.land(get.pack_id, flight, error or CancelledError("the request was given up"))
            # Request, task and frames refer to each other: their megabytes would wait for the garbage collector.
            flight.frame = flight.get = None
        get.task, get.ended = None, True
        if again:
            self.send(get.pack_id, get.table, again, ahead=False)
        batch = self._on_hand.of(get)
        get.drop()
        if batch:
            self._readers.landed(batch)

    def ahead(
        self, pack_id: str, table: FrameTable, frames: list[int], lease: Lease, *, streamed: bool = True
    ) -> list[Get]:
        """Ask for frames that no read waits for, with memory of `lease`; `streamed`: one will."""
        flights = [Flight(frame) for frame in frames]
        self.flights.update({(pack_id, flight.number): flight for flight in flights})
        return self.send(pack_id, table, flights, ahead=True, streamed=streamed, lease=lease)

    def give_up(self, get: Get) -> None:
        """End a request that nobody waits for."""
        if not get.wanted and get.task is not None:
            get.task.cancel()
            for flight in get.frames:  # at once, so that no newcomer joins what is ending
                self.land(get.pack_id, flight, CancelledError("the request was given up"))

    def land(self, pack_id: str, flight: Flight, error: FloeError) -> None:
        """A frame is no longer under way; who still waits for it does so in vain."""
        if self.flights.get((pack_id, flight.number)) is flight:
            del self.flights[pack_id, flight.number]
        for read in list(flight.waiters):
            self._readers.lose(read, flight, error)

    # from deliveries

    def arrived(self, get: Get, number: int, frame: VerifiedFrame) -> None:
        """See Receiver.arrived."""
        if get.ended:
            return  # it was given up in the meantime, and its memory given back
        flight = get.frames[number - get.first]
        flight.frame = frame
        if get.pack_id in self.known_damage:
            self.known_damage.remove(get.pack_id, number)
        self._on_hand.add(get, number, frame)
        waiters, flight.waiters = flight.waiters, set()
        held = self._on_hand.find(get.pack_id, number)
        for read in waiters:
            self._readers.give(read, number, frame.content, get)
            if held is not None:
                self._readers.has_read(read, held)

    def damaged(self, get: Get, number: int, error: DamagedError) -> None:
        """See Receiver.damaged."""
        self.damages[get.pack_id, number] = error
        self.known_damage.add(get.pack_id, number, time.time())
        self.land(get.pack_id, get.frames[number - get.first], error)

    async def stop(self) -> None:
        """End all of them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """After `stop`, in another thread: wait for what is being verified."""
        self._delivery.close()
