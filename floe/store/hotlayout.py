"""Where an earlier version's hot content was laid out: the packs, by source, so that the next version leaves it there.

Advice like profiles, beside which it lies: an indexer that finds none stores that content once more, and nothing else comes
of it. The packs' chunk tables say what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from floe.store import fields, layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, FloeError, NotFoundError, UnsupportedError
from floe.store.index.base import ChunkPlace
from floe.store.packindex import PackIndex, decode_chunk_table
from floe.store.records import Record

_log = logging.getLogger(__name__)
PACKS_MAX = 64  # of one source; a hot pack that is worth keeping holds a mebibyte


@dataclass(frozen=True)
class LayoutRecord(Record):
    """The `packs` in which hot content of trees of `source` lies together."""

    FORMAT: ClassVar[str] = "floe.layout"
    REPAIR: ClassVar[str] = "it is replaced when an image of that name is indexed with a profile"

    source: str
    packs: tuple[str, ...]

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> LayoutRecord:
        return cls(fields.text(value["source"], "source"), fields.each(value["packs"], "packs", fields.hexdigest))


class HotLayouts:
    """The records beside what `catalog` names. Thread-safe. What cannot be read counts as not there, and is logged."""

    def __init__(self, catalog: Catalog) -> None:
        self._store = catalog.store

    def places(self, source: str) -> dict[tuple[bytes, int], ChunkPlace]:
        """Where hot content of `source` was laid out, by digest and length; of packs that are whole in the store."""
        found: dict[tuple[bytes, int], ChunkPlace] = {}
        for pack_id in self._packs(source):
            try:
                index = PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)
                table = decode_chunk_table(self._store.get(layout.chunk_table_key(pack_id)), index, pack_id)
            except FloeError as error:
                _log.info("pack %s is not looked into for hot content: %s", pack_id, error)
                continue
            for entry in table:
                found.setdefault((entry.digest, entry.length), ChunkPlace(pack_id, entry.block))
        return found

    def put(self, source: str, packs: Iterable[str]) -> None:
        """Say where hot content of `source` lies together now; the last one to say so counts."""
        record = LayoutRecord(source, tuple(packs)[:PACKS_MAX])
        if record.packs == self._packs(source):
            return
        try:
            self._store.put(layout.source_layout_key(source), record.encode())
        except FloeError as error:
            _log.info("where hot files of %s lie is not kept: %s", source, error)

    def _packs(self, source: str) -> tuple[str, ...]:
        key = layout.source_layout_key(source)
        try:
            return LayoutRecord.decode(self._store.get(key), key).packs
        except NotFoundError:
            return ()
        except (DamagedError, UnsupportedError) as error:
            _log.warning("%s; it is done without", error)
        except FloeError as error:
            _log.info("where hot files of %s lie is not known: %s", source, error)
        return ()
