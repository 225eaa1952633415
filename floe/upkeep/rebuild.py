"""An index made anew from the bucket alone: chunks of all packs, and copies of the refs of layers and chains.

It may be stopped anywhere and begun again, and pushes may run beside it: each pack is forgotten and learnt in two steps, and a push
that finds it forgotten stores a chunk once more at worst. What a push adds meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.chunkfinder import each
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError, UnsupportedError
from floe.store.index.null import NullIndex
from floe.store.packindex import ChunkEntry, PackIndex, decode_chunk_table
from floe.store.progress import Progress
from floe.store.records import ChainRecord, Ref

_BATCH = 512  # packs that an index forgets at once


@dataclass
class Rebuilt:
    """What the index knows now; `gone`: packs that it knew and the store does not have; `left_out`: packs and keys of refs, and why."""

    packs: int = 0
    chunks: int = 0
    refs: int = 0
    gone: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def rebuild_index(catalog: Catalog, progress: Progress | None = None) -> Rebuilt:
    """Fill the index of `catalog`, whatever it held before.

    UnavailableError: the index, or the store, cannot be used; BadInputError: there is no index. Memory is for the names of
    packs and the chunks of some of them.
    """
    if isinstance(catalog.index, NullIndex):
        raise BadInputError("no index is set", hint="give --index, for example sqlite:/var/lib/floe/index.db")
    return _Rebuilding(catalog, progress).run()


class _Rebuilding:
    def __init__(self, catalog: Catalog, progress: Progress | None) -> None:
        self._catalog, self._store, self._index = catalog, catalog.store, catalog.index
        self._progress = progress
        self._done = Rebuilt()

    def run(self) -> Rebuilt:
        self._index.bind(self._catalog.check_store().uuid)
        tables = {_name(info.key): info.size for info in self._store.list(layout.CHUNK_TABLES)}
        sizes = {_name(info.key): info.size for info in self._store.list(layout.PACKS)}
        refs = [info for prefix in (layout.LAYER_REFS, layout.CHAIN_REFS) for info in self._store.list(prefix)]
        if self._progress is not None:
            self._progress.total(sum(tables.values()) + sum(info.size for info in refs))
        before = self._index.pack_ids()
        gone = before - sizes.keys()
        self._index.remove_packs(gone)
        self._done.gone = len(gone)
        known = sorted(sizes)
        learnt: list[tuple[bytes, int]] = []
        for start in range(0, len(known), _BATCH):
            batch = known[start : start + _BATCH]
            self._index.remove_packs(before.intersection(batch))
            for pack_id, entries in self._tables(batch, sizes):
                self._index.add_pack(pack_id, entries)
                self._done.packs += 1
                self._done.chunks += len(entries)
                learnt = [(entry.digest, entry.length) for entry in entries[:1]] or learnt
                self._advance(tables.get(pack_id, 0))
        for key, data in each(self._ref, [info.key for info in refs]):
            if not isinstance(data, bytes):
                self._index.delete_ref(key)
                if data is not None:
                    self._done.left_out[key] = str(data)
            else:
                self._index.put_ref(key, data)
                self._done.refs += 1
                self._advance(len(data))
        self._index.find_chunks(learnt)  # a look-up, as a push's: from here on the index calls itself filled
        return self._done

    def _advance(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress.advance(nbytes)

    def _tables(self, batch: list[str], sizes: dict[str, int]) -> Iterator[tuple[str, list[ChunkEntry]]]:
        def read(pack_id: str) -> tuple[str, list[ChunkEntry] | FloeError]:
            try:
                index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
                if index.stored_size != sizes[pack_id]:
                    raise DamagedError(f"pack {pack_id} has {sizes[pack_id]} bytes, its index says {index.stored_size}")
                return pack_id, decode_chunk_table(self._store.get(layout.chunk_table_key(pack_id)), index, pack_id)
            except FloeError as error:
                if error.retryable:
                    raise
                return pack_id, error

        for pack_id, found in each(read, batch):
            if isinstance(found, FloeError):
                self._done.left_out[pack_id] = str(found)
            else:
                yield pack_id, found

    def _ref(self, key: str) -> tuple[str, bytes | FloeError | None]:
        try:
            data = bytes(self._store.get(key))
            (Ref if key.startswith(f"{layout.LAYER_REFS}/") else ChainRecord).decode(data, key)
        except NotFoundError:  # removed since it was listed
            return key, None
        except (DamagedError, UnsupportedError) as error:
            return key, error
        return key, data


def _name(key: str) -> str:
    return key.rpartition("/")[2]
