"""What reads that were not answered at once waited for, and how long requests to the store took: histograms, and single stalls.

Part of a fetcher, in its event loop: once for each read that waited and each request, never for a frame, and never for what memory
or the cache answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from floe.store.errors import CancelledError, FloeError, TransitDamageError
from floe.store.histogram import Histogram
from floe.store.reading import Get, Read

STALL = 0.02  # seconds from which on a wait is told as a stall
STORE, AHEAD, DISK = "store", "read_ahead", "disk"
ERRORS, DAMAGE, MEMORY, INDEX = "store_error", "damaged_in_transit", "memory", "pack_index"
CAUSES = (STORE, AHEAD, DISK, ERRORS, DAMAGE, MEMORY, INDEX)
"""The store's answer; content that was on its way already; the cache's disk; the store's answer after failures; content that did
not match its digest and was fetched again; memory (fetch_memory); an index of a pack that was not on this node any more."""
DEMAND, READ_AHEAD, BACKGROUND = "demand", "readahead", "background"
CLASSES = (DEMAND, READ_AHEAD, BACKGROUND)
"""Requests that a read waited for when they began; those ahead of a sequential reader; those of start-up profiles and completion."""


class Stall(NamedTuple):
    """A read of `length` bytes of content at `offset` of a pack took `seconds`, because of `cause` (CAUSES); `detail` for people."""

    pack_id: str
    offset: int
    length: int
    seconds: float
    cause: str
    detail: str


class Waits:
    """`stalled` is told of every wait of STALL seconds and more; `clock` is the event loop's."""

    def __init__(self, clock: Callable[[], float], stalled: Callable[[Stall], object] = lambda _stall: None) -> None:
        self._clock = clock
        self._stalled = stalled
        self._reads = {cause: Histogram() for cause in CAUSES}
        self._requests = {name: Histogram() for name in CLASSES}

    def finished(self, read: Read, error: FloeError | None) -> None:
        """A read was answered, or failed with `error`."""
        if isinstance(error, CancelledError):
            return  # its reader went away: nobody knows how long it would have taken
        seconds = self._clock() - read.submitted
        cause = _cause(read, seconds)
        self._reads[cause].add(seconds)
        if seconds >= STALL:
            why = error or (read.source.error if read.source is not None else None)
            self._stalled(Stall(read.pack_id, read.offset, read.length, seconds, cause, str(why) if why else ""))

    def requested(self, get: Get) -> None:
        """A request to the store ended well."""
        name = READ_AHEAD if get.streamed else BACKGROUND if get.ahead else DEMAND
        self._requests[name].add(self._clock() - get.began)

    def status(self) -> dict[str, Any]:
        """`read_seconds` by cause, `request_seconds` by class: each as Histogram.encode gives it. From any thread."""
        return {
            "read_seconds": {cause: found.encode() for cause, found in self._reads.items()},
            "request_seconds": {name: found.encode() for name, found in self._requests.items()},
        }


def _cause(read: Read, seconds: float) -> str:
    """What most of the wait was for, as far as it shows: the last that came decides."""
    if not read.granted or read.granted - read.submitted > seconds / 2:
        ended = read.submitted + seconds  # it may have failed before it came that far
        if (read.indexed or ended) - read.submitted > seconds / 2:
            return INDEX
        if (read.granted or ended) - read.indexed > seconds / 2:
            return MEMORY
    get = read.source
    if get is None:
        get = next((flight.get for flight in read.flights.values() if flight.get is not None), None)
    if get is None:
        return DISK
    if isinstance(get.error, TransitDamageError):
        return DAMAGE
    if get.error is not None:
        return ERRORS
    return AHEAD if get.ahead else STORE
