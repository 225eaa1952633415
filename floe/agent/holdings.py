"""Which trees are on this node, and which of them as a whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cachetools import LRUCache

from floe.store.cache import Cache
from floe.store.erofs import read_device_table
from floe.store.errors import FloeError
from floe.store.ids import is_hexdigest

_REMEMBERED = 4096


class Holdings:
    """The trees in `cache`. For one thread at a time."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._packs: LRUCache[str, tuple[str, ...]] = LRUCache(_REMEMBERED)

    def trees(self, most: int) -> dict[str, bool]:
        """The `most` newest, by digest: whether all their packs are complete, verified and synced to the disk."""
        found: dict[str, tuple[float, Path]] = {}
        for member in self._cache.members:
            with suppress(OSError):
                for path in member.trees.iterdir():
                    if path.suffix == ".erofs" and is_hexdigest(path.stem):
                        found[path.stem] = (path.stat().st_mtime, path)
        newest = sorted(found.items(), key=lambda item: item[1][0], reverse=True)[:most]
        return {tree: self._is_whole(tree, path) for tree, (_, path) in newest}

    def _is_whole(self, tree: str, path: Path) -> bool:
        try:
            packs = self._packs.get(tree)
            if packs is None:
                packs = self._packs[tree] = tuple(pack_id for pack_id, _ in read_device_table(path))
            return all(self._cache.is_complete(pack_id) for pack_id in packs)
        except (FloeError, OSError):
            return False
