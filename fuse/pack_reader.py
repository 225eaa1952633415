"""Reads packs for the worker: from the cache at once, from the object store in good time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from floe.fuse.framemaps import Touched, frames_of
from floe.store.cache import Writer
from floe.store.completion import Order
from floe.store.fetcher import DAMAGE_MEMORY, Fetcher
from floe.store.ids import Buffer, is_hexdigest
from floe.store.objects.base import ObjectStore
from floe.store.reading import Done, Read
from floe.store.recorder import Recorder
from floe.store.replay import Run
from floe.store.waits import Stall


class _Hits:
    """One thread's count of reads that cache and memory answered: adding needs no lock."""

    __slots__ = ("bytes", "prefetched_bytes", "prefetched_requests", "requests")

    def __init__(self) -> None:
        self.requests = self.bytes = 0
        self.prefetched_requests = self.prefetched_bytes = 0


class PackReader:
    """Packs of `store` through the cache that `writer` writes (and which stays its owner's to close).

    `readahead`: the largest window of bytes fetched ahead of a sequential reader, 0 for none. `deadline`: seconds
    that a read may take. `budget`: bytes of memory for data on its way. `recorder` is told of reads of the packs it
    records. `completion_rate`: bytes a second that `complete` may take from the store, 0 for all. `damage_memory`: seconds
    for which damage at rest is believed in; `stalled` is told, by the event loop, of reads that took long. All methods are thread-safe.
    """

    def __init__(
        self,
        store: ObjectStore,
        writer: Writer,
        *,
        readahead: int,
        deadline: float = 300.0,
        budget: int = 256 << 20,
        recorder: Recorder | None = None,
        completion_rate: int = 0,
        damage_memory: float = DAMAGE_MEMORY,
        stalled: Callable[[Stall], object] = lambda _stall: None,
    ) -> None:
        self._writer = writer
        self._fetcher = Fetcher(
            store,
            writer,
            readahead=readahead,
            deadline=deadline,
            budget=budget,
            completion_rate=completion_rate,
            damage_memory=damage_memory,
            stalled=stalled,
        )
        self.known_damage = self._fetcher.known_damage
        self._packs = writer.packs
        self._marks = self._fetcher.marks
        self._on_hand = self._fetcher.on_hand
        self._local = threading.local()
        self._hits: list[_Hits] = []
        self._recorder = recorder or Recorder()
        self.touched = Touched(lambda pack_id: frames_of(writer, pack_id))

    def lookup(self, pack_id: str) -> int | None:
        """Bytes of a pack's content, without the network; None when its index is not on this node."""
        return self._writer.cache.content_size(pack_id) if is_hexdigest(pack_id) else None

    def read_cached_into(
        self, pack_id: str, offset: int, buffer: memoryview, *, wait: bool = True, told: bool = True
    ) -> bool:
        """Fill `buffer` with content from `offset` on when all of it is in the cache and trusted; else False.

        With `wait=False` BlockingIOError when that would take the disk. While reads go around the disk, False for that.
        `told=False`: the caller calls `answered`.
        """
        pack = self._packs.get(pack_id) or self._writer.pack(pack_id)
        if pack is None:
            return False
        if pack.bypass.diverts:
            if not pack.read_from_memory(offset, buffer):
                return False
        elif not pack.read_into(offset, buffer, wait=wait):
            return False
        hits = self._hits_here()
        hits.requests += 1
        hits.bytes += len(buffer)
        if told:
            self.answered(pack_id, offset, len(buffer))
        return True

    def on_hand(self, pack_id: str, offset: int, length: int, *, told: bool = True) -> list[Buffer] | None:
        """Content that was fetched ahead and is still in memory, in order, when that is all of it. `told`: as above."""
        pieces = self._on_hand.pieces(pack_id, offset, length)
        if pieces is not None:
            hits = self._hits_here()
            hits.prefetched_requests += 1
            hits.prefetched_bytes += length
            if told:
                self.answered(pack_id, offset, length)
        return pieces

    def _hits_here(self) -> _Hits:
        try:
            hits: _Hits = self._local.hits
        except AttributeError:
            hits = self._local.hits = _Hits()
            self._hits.append(hits)
        return hits

    def answered(self, pack_id: str, offset: int, length: int) -> None:
        """Record a read where that is wanted, and tell the fetcher of one that it waits for to fetch further ahead.

        Nobody waits for that: it comes best when the reader has its answer.
        """
        if pack_id in self._recorder.packs:
            self._recorder.note(pack_id, offset, length)
        self.touched.note(pack_id, offset, length)
        for start, stop in self._marks.get(pack_id, ()):
            if offset < stop and start < offset + length:
                self._marks.pop(pack_id, None)  # said once; the answer sets new ones
                self._fetcher.hit(pack_id, offset, length)
                break

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Read:
        """Begin a read. `done` is called once, from another thread, with buffers of `length` bytes in all or an error.

        Errors: NotFoundError, BadInputError, DamagedError, UnavailableError, DeadlineError, AccessDeniedError,
        CancelledError. The buffers are the caller's until `done` returns. The result has `cancel()`.
        """
        if pack_id in self._recorder.packs:
            self._recorder.note(pack_id, offset, length)
        self.touched.note(pack_id, offset, length)
        return self._fetcher.submit(pack_id, offset, length, done)

    def replay(self, runs: Iterable[Run], fetched: set[tuple[str, int]], *, later: bool = False) -> None:
        """Fetch `runs` in their order and ahead of need; `fetched` gets the frames that were not here.

        `later`: when nothing is left of those without it.
        """
        self._fetcher.replay(runs, fetched, later=later)

    def stop_replay(self, fetched: set[tuple[str, int]]) -> None:
        """Ask for no more of the `runs` that came with this set."""
        self._fetcher.stop_replay(fetched)

    def complete(self, orders: Sequence[Order]) -> None:
        """Fetch what these orders need, the first one first, with what reads leave over; in place of all orders before."""
        self._fetcher.complete(orders)

    def counters(self) -> dict[str, int]:
        """Requests and bytes by source (`cache_`, `prefetched_`, `store_`, `readahead_`), faults, memory, the cache's own."""
        return {
            "cache_requests": sum(hits.requests for hits in self._hits),
            "cache_bytes": sum(hits.bytes for hits in self._hits),
            "prefetched_requests": sum(hits.prefetched_requests for hits in self._hits),
            "prefetched_bytes": sum(hits.prefetched_bytes for hits in self._hits),
            **self._fetcher.counters(),
            **self._recorder.counts,
            **{f"kept_{name}": value for name, value in self._writer.counters().items()},
        }

    def waits(self) -> dict[str, Any]:
        """What reads waited for and requests took; see Fetcher.status."""
        return self._fetcher.status()

    def close(self) -> None:
        """Stop fetching; outstanding reads end with CancelledError. The writer is left open."""
        self._fetcher.close()
