"""The object store interface. tests/contracts/ holds the suite that every implementation passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from floe.store.ids import Buffer


@dataclass(frozen=True)
class ObjectInfo:
    """`key` relative to the store's root, `size` in bytes, `version` an opaque token for `put_if`.

    `modified`: when it was last written, by the store's own clock: POSIX seconds, compared with each other only.
    """

    key: str
    size: int
    version: str
    modified: float


class Range(Protocol):
    """Bytes of an object, in order. For one thread, but `abort` for any."""

    def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with what comes next; a FloeError when that cannot be had."""
        ...

    def abort(self) -> None:
        """Nobody wants the rest: a `readinto` under way fails."""
        ...

    def close(self) -> None:
        """Done, at whatever point."""
        ...


class ObjectStore(Protocol):
    """Flat, immutable-by-convention objects. Methods are thread-safe and raise FloeError classes only.

    NotFoundError: no such key. AccessDeniedError: credentials or permission. UnavailableError and its
    children: cannot be reached, throttled or too slow. A range past the end is an error, never short; so is, before its
    bytes are asked for, an object above WHOLE_MAX bytes (see keys.py) that is to be read whole.
    """

    url: str
    """The store's address without secrets, as shown to people."""

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """Bytes [start, start + length) of the object; `length=None`: to the end."""
        ...

    def open_range(self, key: str, start: int, length: int) -> Range:
        """The same, to be read into the caller's memory. Any error, here or then: not this way, or not now; `get` may work."""
        ...

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """The same for an event loop, cancellable: hundreds may wait at once."""
        ...

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """A small object whole, with the version token of what was read."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """Size and version."""
        ...

    def put(self, key: str, data: Buffer) -> None:
        """Create or replace, atomically and durably."""
        ...

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Create or replace from a local file of any size; `progress` gets byte increments."""
        ...

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """Replace only version `version` (None: only create); returns the new version. ConflictError: lost."""
        ...

    def delete(self, key: str) -> None:
        """Remove; a key that is not there is no error."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below `prefix` (a folder: `refs/models`), in no promised order."""
        ...

    def close(self) -> None:
        """Release connections; the store is not used afterwards."""
        ...
