"""What is known of packs that are in the store already: checked once, before anything relies on them.

They are protected from garbage collection first, so that a pack that was found stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from floe.store import layout
from floe.store.errors import DamagedError, NotFoundError, UnsupportedError
from floe.store.objects.base import ObjectStore
from floe.store.packindex import BLOCK, PackIndex
from floe.store.protection import Protection
from floe.store.records import PackEntry


class PackInfo:
    """Pack id -> PackEntry, read from the store's pack indexes and remembered. Thread-safe."""

    def __init__(self, store: ObjectStore, protection: Protection) -> None:
        self._store = store
        self._protection = protection
        self._known: dict[str, PackEntry | None] = {}
        self._lock = threading.Lock()  # guards _known; not held during I/O

    def add(self, entry: PackEntry) -> None:
        """Remember a pack that was just published."""
        with self._lock:
            self._known[entry.id] = entry

    def protect(self, pack_ids: Iterable[str]) -> None:
        """Protect packs that are about to be looked for, all in one request. BusyError, ConflictError: see Protection."""
        self._protection.protect(layout.pack_key(pack_id) for pack_id in pack_ids)

    def find(self, pack_id: str) -> PackEntry | None:
        """The pack's sizes; None when it, or its index, is missing, damaged or of a newer format. Store errors propagate."""
        with self._lock:
            if pack_id in self._known:
                return self._known[pack_id]
        self.protect((pack_id,))
        try:
            entry: PackEntry | None = self._read(pack_id)
        except (NotFoundError, DamagedError, UnsupportedError):
            entry = None
        with self._lock:
            return self._known.setdefault(pack_id, entry)

    def get(self, pack_id: str) -> PackEntry:
        """The same; DamagedError when the pack cannot be used."""
        entry = self.find(pack_id)
        if entry is None:
            raise DamagedError(
                f"pack {pack_id} is missing in the store, or damaged", hint="push its model or index its image again"
            )
        return entry

    def blocks(self, pack_id: str) -> int:
        """4 KiB blocks of the pack's content."""
        return self.get(pack_id).content_size // BLOCK

    def _read(self, pack_id: str) -> PackEntry:
        index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
        if self._store.head(layout.pack_key(pack_id)).size != index.stored_size:
            raise DamagedError(f"pack {pack_id} does not have the size that its index says")
        return PackEntry(pack_id, index.content_size, index.stored_size, index.frame_size)
