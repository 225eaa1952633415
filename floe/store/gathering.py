"""Where the frames of reads come from: requests under way, memory, the cache's disk, or new requests to the store.

Part of a fetcher, in its event loop; the cache's disk is read in threads. A read joins frames that are being fetched, takes those
that are in memory, reads those in the cache, and asks for the rest: adjacent ones, of all reads that come together, in one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from cachetools import LRUCache

from floe.store.around import Around
from floe.store.cache import Writer
from floe.store.errors import FloeError, UnavailableError
from floe.store.frames import VerifiedFrame
from floe.store.ids import Buffer
from floe.store.onhand import Held, OnHand
from floe.store.reading import Flight, Read, read_local
from floe.store.requests import Readers, Requests

_log = logging.getLogger(__name__)


class Reads(Readers, Protocol):
    """Whose the reads are."""

    @property
    def closed(self) -> bool:
        """Whether it is being closed: nothing new is begun."""
        ...

    def finish(self, read: Read, error: FloeError | None) -> None:
        """Answer a read; None: it has all of its pieces."""
        ...

    def tell(self, call: Callable[..., object], *args: object) -> None:
        """Run `call` in the event loop; from any thread."""
        ...


class Gatherer:
    """Gets reads their frames. `threads` read the cache's disk; `kept`: bytes of memory for frames that the cache could not keep."""

    def __init__(
        self,
        reads: Reads,
        writer: Writer,
        requests: Requests,
        on_hand: OnHand,
        *,
        loop: asyncio.AbstractEventLoop,
        threads: Executor,
        kept: int,
    ) -> None:
        self._reads = reads
        self._writer = writer
        self._requests = requests
        self._on_hand = on_hand
        self._loop = loop
        self._threads = threads
        self._kept: LRUCache[tuple[str, int], VerifiedFrame] = LRUCache(kept, getsizeof=len)
        self.around = Around(writer, loop, self._read_disk)

    def gather(self, reads: list[Read]) -> None:
        """Join, look up or ask for every frame of reads that got their memory."""
        self._fetch_missing(reads, {read: list(read.frames) for read in reads}, local=True)

    def _fetch_missing(self, reads: list[Read], frames: dict[Read, list[int]], *, local: bool) -> None:
        fresh: dict[str, list[Flight]] = {}
        try:
            self._join_or_ask(reads, frames, fresh, local=local)
        except Exception as problem:
            # Nobody may be left waiting for a flight that was not sent.
            _log.exception("reads could not be begun")
            error = UnavailableError(f"the read could not be begun: {problem!r}")
            for read in reads:
                self._reads.finish(read, error)
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
                self._threads.submit(self._read_local, read, here)
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
        local = here is not None and self.is_local(*key)
        if flight is not None:
            read.fresh = False
            if flight.frame is not None:
                self._reads.give(read, frame, flight.frame.content, flight.get)
                return
        elif (held := self._on_hand.find(*key)) is not None:
            assert held.frame is not None
            read.fresh = False
            self._reads.give(read, frame, held.frame.content, held.get)
            self._reads.has_read(read, held)
            return
        elif key in self._kept:
            read.fresh = False
            self._reads.give(read, frame, self._kept[key].content, None)
            return
        # Asked once: it may be forgotten in between.
        elif (damage := self._requests.damages.get(key)) is not None and not local:
            self._reads.finish(read, damage)
            return
        elif here is not None and local and (damage is not None or not self.around.is_taken(read.pack_id)):
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
            self.around.begin(read)

    # the cache's disk

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
        self._reads.tell(self._local_done, read, frames, found)

    def _read_disk(self, read: Read, frames: list[int]) -> None:
        """Read frames that are being fetched, too, from the cache's disk, where they are there."""
        here = [frame for frame in frames if self.is_local(read.pack_id, frame)]
        if here and not self._reads.closed:
            read.returning.update(here)
            self._threads.submit(self._read_local, read, here)

    def _local_done(self, read: Read, frames: list[int], found: dict[int, Buffer]) -> None:
        read.returning.difference_update(frames)
        for frame, piece in found.items():
            if read.finished or frame in read.pieces:
                continue
            flight = read.flights.get(frame)
            if flight is not None:
                flight.waiters.discard(read)
            read.source = None
            if read.keep(frame, piece):
                self._reads.finish(read, None)
            if flight is not None and flight.get is not None and not flight.get.ahead:
                self._requests.give_up(flight.get)
        missing = [f for f in frames if f not in found and f not in read.flights and f not in read.pieces]
        if missing and not read.finished:
            self._fetch_missing([read], {read: missing}, local=False)

    def written(self, batch: list[Held], lost: list[tuple[Held, VerifiedFrame]]) -> None:
        """What was fetched is on the disk, but for what is `lost`; see WriteBehind."""
        if batch and self.around.is_taken(batch[0].get.pack_id):
            lost = [(held, frame) for held in batch if (frame := held.frame) is not None]
        for held, frame in lost:
            if not held.get.streamed:
                with contextlib.suppress(ValueError):  # larger than all that may be kept
                    self._kept[held.get.pack_id, held.number] = frame
        self._on_hand.settle(batch)

    # what is where

    def is_local(self, pack_id: str, frame: int) -> bool:
        """Whether a frame is on the cache's disk."""
        pack = self._writer.pack(pack_id)
        return pack is not None and (pack.bits.is_trusted(frame) or pack.bits.is_suspect(frame))

    def is_pending(self, pack_id: str, frame: int) -> bool:
        """Whether a frame is being fetched, or in memory on its way to the disk."""
        return (pack_id, frame) in self._requests or self._on_hand.find(pack_id, frame) is not None

    def is_absent(self, pack_id: str, frame: int) -> bool:
        """Whether a frame is neither here nor on its way, and can be had."""
        if self.is_pending(pack_id, frame) or (pack_id, frame) in self._requests.damages:
            return False
        return not self.is_local(pack_id, frame)

    def is_worth_fetching(self, pack_id: str, frame: int) -> bool:
        """As `is_absent`, but what is on a disk that reads go around counts as absent."""
        if not self.around.is_taken(pack_id):
            return self.is_absent(pack_id, frame)
        return not self.is_pending(pack_id, frame) and (pack_id, frame) not in self._requests.damages
