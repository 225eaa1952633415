"""The frame tables of packs, as their indexes on this node list them, the last ones used in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachetools import LRUCache

from floe.store.frames import FrameTable
from floe.store.packindex import PackIndex

_BYTES = 16 << 20  # of tables kept in memory


class Tables:
    """`index` finds a pack's index. Thread-safe."""

    def __init__(self, index: Callable[[str], PackIndex | None]) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._tables: LRUCache[str, FrameTable] = LRUCache(_BYTES, getsizeof=lambda t: 512 + 48 * len(t))

    def get(self, pack_id: str) -> FrameTable | None:
        """The pack's frames; None when its index is not on this node. The disk's errors."""
        with self._lock:
            table = self._tables.get(pack_id)
        if table is None:
            index = self._index(pack_id)
            if index is None:
                return None
            table = FrameTable(index)
            with self._lock:
                self._tables[pack_id] = table
        return table
