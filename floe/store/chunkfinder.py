"""Where chunks are stored already: the index's knowledge, brought up to date with the bucket."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from floe.store import layout
from floe.store.errors import DamagedError, NotFoundError, UnavailableError, UnsupportedError
from floe.store.ids import is_hexdigest
from floe.store.index.base import ChunkPlace, Index
from floe.store.index.memory import MemoryIndex
from floe.store.index.null import NullIndex
from floe.store.objects.base import ObjectStore
from floe.store.packindex import ChunkEntry, PackIndex, decode_chunk_table

_log = logging.getLogger(__name__)
T = TypeVar("T")

_READERS = 16  # small objects read at once
_AHEAD = 64  # results that may wait to be taken


class ChunkFinder:
    """The chunks of `store` by way of `index`. Thread-safe.

    Without an index, or when it fails, the chunk tables of the bucket are kept in memory instead; only the store's
    errors are raised.
    """

    def __init__(self, store: ObjectStore, index: Index) -> None:
        self._store = store
        self._given = index
        self._index: Index = MemoryIndex() if isinstance(index, NullIndex) else index
        self._lock = threading.Lock()  # guards _index; never held during I/O

    def sync(self) -> None:
        """Learn the bucket's packs that are not known, forget those that are gone.

        A pack counts when the pack, its index and its chunk table are all there; a damaged one is logged and left out.
        """
        stored = self._stored_packs()
        index = self._current()
        try:
            self._sync(index, stored)
        except _IndexError as failed:
            self._sync(self._without_index(failed), stored)

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """Learn the chunks of a pack just published."""
        entries = list(chunks)
        try:
            self._current().add_pack(pack_id, entries)
        except UnavailableError as error:
            _log.warning("%s; pack %s will be learnt later", error, pack_id)

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks; as of the last `sync`."""
        wanted = list(keys)
        try:
            return self._current().find_chunks(wanted)
        except UnavailableError as error:
            memory = self._without_index(error)
        self._sync(memory, self._stored_packs())
        return memory.find_chunks(wanted)

    def _current(self) -> Index:
        with self._lock:
            return self._index

    def _without_index(self, error: Exception) -> Index:
        """From now on this process keeps the chunks in memory."""
        _log.warning("%s; deduplicating with the store's chunk tables", error)
        with self._lock:
            if self._index is self._given:
                self._index = MemoryIndex()
            return self._index

    def _stored_packs(self) -> dict[str, int]:
        """Pack ids and pack object sizes in bytes, of packs that have an index and a chunk table."""
        listed = ((_name(info.key), info.size) for info in self._store.list(layout.PACKS))
        packs = {name: size for name, size in listed if is_hexdigest(name)}  # others may put things there
        for prefix in (layout.PACK_INDEXES, layout.CHUNK_TABLES):
            named = {_name(info.key) for info in self._store.list(prefix)}
            packs = {pack_id: size for pack_id, size in packs.items() if pack_id in named}
        return packs

    def _sync(self, index: Index, stored: dict[str, int]) -> None:
        known = _ask(index.pack_ids)
        if stored and not known and index is self._given:
            _log.warning(
                "index %s knows none of the store's %d packs: it is filled from the bucket", index.url, len(stored)
            )
        _ask(lambda: index.remove_packs(known - stored.keys()))

        def read(pack_id: str) -> tuple[str, list[ChunkEntry]] | None:
            try:
                return pack_id, self._read_chunk_table(pack_id, stored[pack_id])
            except (NotFoundError, DamagedError, UnsupportedError) as error:
                _log.warning("pack %s is not used for deduplication: %s", pack_id, error)
                return None

        for found in each(read, stored.keys() - known):
            if found is not None:
                pack_id, entries = found
                _ask(partial(index.add_pack, pack_id, entries))

    def _read_chunk_table(self, pack_id: str, size: int) -> list[ChunkEntry]:
        index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
        if index.stored_size != size:
            raise DamagedError(f"pack {pack_id} has {size} bytes, its index says {index.stored_size}")
        return decode_chunk_table(self._store.get(layout.chunk_table_key(pack_id)), index, pack_id)


def each(work: Callable[[str], T], items: Iterable[str]) -> Iterator[T]:
    """`work` of each item, several at once, in the order given; the first error ends it."""
    wanted = list(items)
    if len(wanted) < 2:
        yield from map(work, wanted)
        return
    with ThreadPoolExecutor(min(_READERS, len(wanted)), thread_name_prefix="floe-store") as pool:
        for start in range(0, len(wanted), _AHEAD):  # so that results do not pile up before a slow taker
            yield from pool.map(work, wanted[start : start + _AHEAD])


class _IndexError(Exception):
    """The index failed, as opposed to the store."""


def _ask(call: Callable[[], T]) -> T:
    try:
        return call()
    except UnavailableError as error:
        raise _IndexError(str(error)) from error


def _name(key: str) -> str:
    return key.rpartition("/")[2]
