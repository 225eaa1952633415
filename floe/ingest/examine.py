"""Which packs of the store are damaged at rest, and where: those reported (store/damage.py), and those somebody asks for.

A pack is read whole for it, once in a command.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from floe.store import layout
from floe.store.damage import reported, settle
from floe.store.errors import DamagedError, NotFoundError, StoreMissingError, UnsupportedError
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.packindex import ChunkEntry, PackIndex, decode_chunk_table
from floe.store.packpieces import pieces

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DamagedPack:
    """A pack with at least one of its frames in `bad`."""

    id: str
    index: PackIndex
    chunks: tuple[ChunkEntry, ...]
    bad: tuple[int, ...]


class Examiner:
    """Of the packs in `store`, for all ingests of a command. Thread-safe; raises the store's errors."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._reported: frozenset[str] | None = None
        self._found: dict[str, DamagedPack | None] = {}
        self._looking = threading.Lock()  # held while a pack is read: the others want to know, too
        self.healing = threading.Lock()
        """Who uploads a healed pack holds it, so that no other's work on the same pack is lost."""

    def reported(self) -> frozenset[str]:
        """Packs that were reported and not healed since."""
        with self._looking:
            if self._reported is None:
                self._reported = frozenset(reported(self._store))
            return self._reported

    def examine(self, pack_id: str) -> DamagedPack | None:
        """What of a pack is damaged; None: nothing, or so much that nothing is built upon it."""
        is_reported = pack_id in self.reported()
        with self._looking:
            if pack_id not in self._found:
                self._found[pack_id] = self._look(pack_id, is_reported=is_reported)
            return self._found[pack_id]

    def _look(self, pack_id: str, *, is_reported: bool) -> DamagedPack | None:
        try:
            index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
            chunks = decode_chunk_table(self._store.get(layout.chunk_table_key(pack_id)), index, pack_id)
        except (NotFoundError, DamagedError, UnsupportedError) as error:
            _log.warning("pack %s cannot be healed, what it held is stored anew: %s", pack_id, error)
            return None
        _, bad = read_pack(self._store, pack_id, index)
        if bad:
            _log.warning("pack %s is damaged in %d of %d frames", pack_id, len(bad), len(index.frames))
            return DamagedPack(pack_id, index, tuple(chunks), tuple(bad))
        if is_reported:
            settle(self._store, pack_id)
        return None


def read_pack(
    store: ObjectStore, pack_id: str, index: PackIndex, into: Callable[[int, Buffer], None] = lambda _at, _data: None
) -> tuple[bool, list[int]]:
    """Whether a pack's object has its size, and the frames that do not match. `into` gets what is there, by offset."""
    key = layout.pack_key(pack_id)
    try:
        size = store.head(key).size
    except StoreMissingError:
        raise
    except NotFoundError:
        size = 0
    bad = []
    for piece in pieces(index):
        there = min(piece.size, max(0, size - piece.start))
        data = store.get(key, piece.start, there) if there else b""
        into(piece.start, data)
        bad += piece.wrong(index, data)
    return size == index.stored_size, bad
