"""No index: nothing is remembered, everything is read from the bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from floe.store.index.base import ChunkPlace, Note
from floe.store.packindex import ChunkEntry


class NullIndex:
    """The index of a store that has none."""

    def __init__(self) -> None:
        self.url = "none"

    def bind(self, store_uuid: str) -> None:
        """See Index.bind."""

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks: none is known."""
        del keys
        return {}

    def pack_ids(self) -> set[str]:
        """See Index.pack_ids: none is known."""
        return set()

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """See Index.add_pack: forgotten at once."""

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """See Index.remove_packs."""

    def get_ref(self, key: str) -> bytes | None:
        """See Index.get_ref: none is known."""
        del key
        return None

    def put_ref(self, key: str, data: bytes) -> None:
        """See Index.put_ref: forgotten at once."""

    def delete_ref(self, key: str) -> None:
        """See Index.delete_ref."""

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """See Index.put_note: forgotten at once."""

    def notes(self, topic: str) -> Mapping[str, Note]:
        """See Index.notes: there are none."""
        del topic
        return {}

    def delete_note(self, topic: str, name: str) -> None:
        """See Index.delete_note."""

    def close(self) -> None:
        """See Index.close."""
