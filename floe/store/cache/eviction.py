"""What to take out of the cache first. Pure.

Recency is kept by extent, 4 MiB of a pack's content, as a number that grows with every frame stored: four bytes an
extent, so that a cache of 1 TiB costs 1 MiB of memory. Order is exact between stores, and arbitrary among reads
that no store separates.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

EXTENT_SHIFT = 22
EXTENT = 1 << EXTENT_SHIFT  # bytes; a multiple of every frame size
EMPTY = 0xFFFFFFFF  # as an extent's recency: nothing of it is in the cache
UNREAD = 0  # as one: nobody asked for it, so it goes before all that was read
_SMALLEST_BATCH_SHARE = 64  # of the cache: one plan serves many stores
_BATCH_MAX = 64 << 20  # bytes


def oldest_first(packs: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(position of the pack, extent) of all that is cached, least recently used first.

    `packs` holds the recency of each extent of each pack. Lazy: only packs that are reached are sorted.
    """
    # An entry with a negative extent stands for a pack that is not sorted yet, by its oldest extent.
    heap = [(min(recency, default=EMPTY), -1, position) for position, recency in enumerate(packs)]
    heapq.heapify(heap)
    while heap:
        used, extent, position = heapq.heappop(heap)
        if used == EMPTY:
            continue
        if extent >= 0:
            yield position, extent
            continue
        for at, value in enumerate(packs[position]):
            if value != EMPTY:
                heapq.heappush(heap, (value, at, position))


def shortage(need: int, held: int, size: int | None, free: int | None, min_free: int) -> int:
    """Bytes to evict before `need` more may be stored; zero or less when there is room.

    `held` bytes are cached of at most `size` (None: no bound); `free` bytes are left on the disk (None: not asked).
    """
    over_size = held + need - size if size is not None else 0
    over_disk = min_free + need - free if free is not None else 0
    return max(over_size, over_disk)


def batch(short: int, size: int | None) -> int:
    """Bytes to evict when `short` are missing: somewhat more, so that not every store has to plan."""
    return max(short, min(_BATCH_MAX, (size if size is not None else EXTENT << 10) // _SMALLEST_BATCH_SHARE))
