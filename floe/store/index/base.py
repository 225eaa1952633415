"""The index interface: an accelerator that can be lost at any time and rebuilt from the bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from floe.store.packindex import ChunkEntry


@dataclass(frozen=True)
class ChunkPlace:
    """Where a chunk is stored: `pack_id` and first 4 KiB `block` of that pack's content."""

    pack_id: str
    block: int


@dataclass(frozen=True)
class Note:
    """What somebody left in the index for others: its `data`, written `age` seconds ago by the index's own clock."""

    data: bytes
    age: float


class Index(Protocol):
    """Thread-safe. Losing everything in it costs time only; UnavailableError never fails a mount or a read."""

    url: str

    def bind(self, store_uuid: str) -> None:
        """Tie the index to a store; an index of another store is emptied first."""
        ...

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """Places of those (digest, length) keys that are known."""
        ...

    def pack_ids(self) -> set[str]:
        """Packs whose chunks are all in the index."""
        ...

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """Record a published pack's chunks, in one transaction."""
        ...

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """Forget packs that are no longer in the store."""
        ...

    def get_ref(self, key: str) -> bytes | None:
        """The cached bytes of an immutable ref (a layer's or a chain's), by its store key."""
        ...

    def put_ref(self, key: str, data: bytes) -> None:
        """Cache an immutable ref."""
        ...

    def delete_ref(self, key: str) -> None:
        """Forget a cached ref."""
        ...

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """Leave `data` under a name of a topic, in place of what was there; it is gone after `seconds`, or any time before.

        `topic`: lower case letters; `name`: not empty, printable ASCII without braces.
        """
        ...

    def notes(self, topic: str) -> Mapping[str, Note]:
        """All of a topic that has not expired, by name."""
        ...

    def delete_note(self, topic: str, name: str) -> None:
        """Take a note away; one that is not there is no error."""
        ...

    def close(self) -> None:
        """Release the index."""
        ...
