"""Indexes behind one interface. `open_index` picks one by its address."""

from __future__ import annotations

from pathlib import Path

from floe.store.errors import BadInputError
from floe.store.index.base import ChunkPlace, Index, Note
from floe.store.index.null import NullIndex

__all__ = ["ChunkPlace", "Index", "Note", "NullIndex", "open_index"]

_EXAMPLES = "use redis://host:6379, rediss://user@host:6379?ca=FILE, sqlite:/abs/path.db or none"


def open_index(url: str | None) -> Index:
    """The index at `url`: `redis://...`, `rediss://...`, `sqlite:/abs/path`, or `none` (also None and the empty string).

    Nothing is read, created or connected to yet. Raises BadInputError for an address of another form.
    """
    if not url or url == "none":
        return NullIndex()
    scheme, _, path = url.partition(":")
    # What only one kind needs is loaded only where it is used: `floe --help` has 0.2 s.
    if scheme in ("redis", "rediss"):
        from floe.store.index.redis.address import RedisAddress  # noqa: PLC0415 - lazy, as said above
        from floe.store.index.redis.index import RedisIndex  # noqa: PLC0415 - likewise

        return RedisIndex(RedisAddress.parse(url))
    if scheme != "sqlite":
        raise BadInputError(f"index address of the unknown kind {scheme!r}", hint=_EXAMPLES)
    if path.startswith("///"):
        path = path[2:]
    if not path.startswith("/") or path.endswith("/"):
        raise BadInputError(f"index address {url!r} is not sqlite:/abs/path", hint=_EXAMPLES)
    from floe.store.index.sqlite import SqliteIndex  # noqa: PLC0415 - lazy, as said above

    return SqliteIndex(Path(path))
