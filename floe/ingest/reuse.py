"""Whether content that is said to be in the store is there: asked by whoever signs, for a signature vouches for all of it.

That a pack holds a chunk at some place is said by the index and by chunk tables, which are no proof: who can write the
bucket can write those. Proof are the frames' digests in the pack index, which the pack id vouches for. Frames that the chunk
fills are compared with them, by the bytes at hand; of those that it shares with others the store's content is read.
"""

from __future__ import annotations

import threading

from cachetools import LRUCache

from floe.store import layout
from floe.store.errors import DamagedError, NotFoundError, TransitDamageError, UnsupportedError
from floe.store.frames import FrameTable, decode_frame
from floe.store.ids import digest
from floe.store.index.base import ChunkPlace
from floe.store.objects.base import ObjectStore
from floe.store.packindex import BLOCK, PackIndex

_TABLES = 16  # pack indexes remembered; the largest takes 1.5 MiB
_CONTENT = 16 << 20  # bytes of frames remembered: small files lie side by side
_READS = 2  # of a frame, before its pack counts as damaged


class Reuse:
    """Looks into `store`. Thread-safe."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._tables: LRUCache[str, FrameTable] = LRUCache(_TABLES)
        self._frames: LRUCache[tuple[str, int], bytes] = LRUCache(_CONTENT, getsizeof=len)
        self._lock = threading.Lock()  # guards both; not held during I/O

    def holds(self, place: ChunkPlace, data: bytes) -> bool:
        """Whether the pack has these bytes at this place, and zeros behind them up to the next block.

        False also for a pack that is missing or damaged: then it is of no use either. Other errors of the store are raised.
        """
        padded = data + bytes(-len(data) % BLOCK)
        start, end = place.block * BLOCK, place.block * BLOCK + len(padded)
        try:
            table = self._table(place.pack_id)
            if end > table.content_size:
                return False
            size = table.frame_size
            for number in range(start // size, (end - 1) // size + 1):
                first = number * size
                last = first + table.content_length(number)
                ours = memoryview(padded)[max(first - start, 0) : last - start]
                if start <= first and last <= end:
                    same = digest(ours) == table.entry(number).digest
                else:
                    offset = max(start - first, 0)
                    same = self._content(place.pack_id, table, number)[offset : offset + len(ours)] == ours
                if not same:
                    return False
        except (NotFoundError, DamagedError, TransitDamageError, UnsupportedError):
            return False
        return True

    def _table(self, pack_id: str) -> FrameTable:
        with self._lock:
            known = self._tables.get(pack_id)
        if known is None:
            index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
            known = FrameTable(index)
            with self._lock:
                self._tables[pack_id] = known
        return known

    def _content(self, pack_id: str, table: FrameTable, number: int) -> bytes:
        with self._lock:
            known = self._frames.get((pack_id, number))
        if known is not None:
            return known
        for attempt in range(1, _READS + 1):
            stored = self._store.get(layout.pack_key(pack_id), *table.stored_range(number))
            try:
                content = bytes(decode_frame(stored, table.entry(number), table.content_length(number)).content)
            except TransitDamageError:
                if attempt == _READS:
                    raise
            else:
                break
        with self._lock:
            self._frames[pack_id, number] = content
        return content
