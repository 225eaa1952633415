"""The frame tables of packs, as their indexes on this node list them, the last ones used in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cachetools import LRUCache

from floe.store.errors import DiskError, NoSpaceError
from floe.store.frames import FrameTable
from floe.store.ids import Buffer
from floe.store.packindex import PackIndex

_log = logging.getLogger(__name__)
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
            table = self._keep(pack_id, index)
        return table

    def known(self, pack_id: str) -> FrameTable | None:
        """The same of those in memory only."""
        with self._lock:
            return self._tables.get(pack_id)

    def learn(self, pack_id: str, data: Buffer, add_index: Callable[[str, Buffer], PackIndex]) -> FrameTable:
        """The frames of a pack whose index object was fetched again. `add_index` puts it on a disk, if one takes it.

        DamagedError, UnsupportedError.
        """
        table = self._keep(pack_id, PackIndex.decode(data, pack_id))
        try:
            add_index(pack_id, data)
        except (DiskError, NoSpaceError, OSError) as error:
            _log.warning("the index of pack %s is kept in memory only: %s", pack_id, error)
        return table

    def _keep(self, pack_id: str, index: PackIndex) -> FrameTable:
        table = FrameTable(index)
        with self._lock:
            self._tables[pack_id] = table
        return table
