"""Pins of packs below native mounts: written before the mount, removed after the superblock is gone.

A hole punched into a pack file under a native mount reads as zeros, silently. So a pack is pinned first, asked whether it
is complete after that, and unpinned only when no superblock uses it any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from floe.mount.mountinfo import MountEntry, mount_at
from floe.mount.quiet import superblock_alive
from floe.mount.state import RunState
from floe.mount.trees import Pack, PackCache, Tree
from floe.store.errors import DiskError, NoSpaceError
from floe.store.ids import hexdigest

_log = logging.getLogger(__name__)


class Pins:
    """The pins of the trees mounted below `run_dir`. Every method but `trees` wants the tree's lock held.

    A pin's owner is `tree-<digest>.<run directory>`: of two run directories on one cache, neither drops the other's.
    """

    def __init__(self, cache: PackCache, state: RunState, run_dir: Path) -> None:
        self._cache = cache
        self._state = state
        self._suffix = f".{hexdigest(os.fsencode(run_dir))[:16]}"

    def owner(self, digest: str) -> str:
        """What the pins of a tree are called."""
        return f"tree-{digest}{self._suffix}"

    def take(self, tree: Tree) -> bool:
        """Pin all packs of `tree` when all are complete and as long as they must be; else pin none and say False.

        So too when the disk takes no pins: the pack filesystem reads from it all the same.
        """
        if not tree.packs or not all(self._cache.is_complete(pack.id) for pack in tree.packs):
            return False
        try:
            before = self.of(tree.digest, (pack.id for pack in tree.packs))
        except OSError as error:  # whose pins of a mount that lives on could be dropped below
            _log.warning("tree %s is not mounted natively, since its pins cannot be read: %s", tree.digest, error)
            return False
        owner, whole = self.owner(tree.digest), False
        try:
            for pack in tree.packs:
                self._cache.pin(pack.id, owner)
            whole = all(self._cache.is_complete(pack.id) and self._is_there(pack) for pack in tree.packs)
        except (DiskError, NoSpaceError, OSError) as error:
            _log.warning(
                "tree %s is mounted through the pack filesystem, since it cannot be pinned: %s", tree.digest, error
            )
        finally:
            if not whole:
                for pack in tree.packs:
                    if pack.id not in before:
                        with contextlib.suppress(DiskError, NoSpaceError):  # what stays is the sweep's
                            self._cache.unpin(pack.id, owner)
        return whole

    def drop(self, digest: str, pack_ids: Iterable[str], mounts: list[MountEntry]) -> None:
        """Unpin a tree's packs, unless its superblock is mounted or lives on somewhere."""
        if mount_at(str(self._state.trees / digest), mounts) is not None:
            return
        for path, record in self._state.lingering(digest):
            if superblock_alive(record, mounts):
                return
            path.unlink(missing_ok=True)
        self._unpin(digest, pack_ids)

    def of(self, digest: str, pack_ids: Iterable[str]) -> set[str]:
        """Those of the packs that the tree pins."""
        owner = self.owner(digest)
        return {pack_id for pack_id in pack_ids if owner in self._cache.pins(pack_id)}

    def trees(self) -> dict[str, list[str]]:
        """All trees that pin packs -> those packs."""
        found: dict[str, list[str]] = {}
        for pack_id in self._cache.pack_ids():
            for owner in self._cache.pins(pack_id):
                if owner.startswith("tree-") and owner.endswith(self._suffix):
                    digest = owner[len("tree-") : -len(self._suffix)]
                    found.setdefault(digest, []).append(pack_id)
        return found

    def _is_there(self, pack: Pack) -> bool:
        """Whether the file that was looked up for the tree is the complete one: there may be a second, in another directory."""
        return self._cache.data_path(pack.id) == pack.data and _full(pack)

    def _unpin(self, digest: str, pack_ids: Iterable[str]) -> None:
        for pack_id in pack_ids:
            self._cache.unpin(pack_id, self.owner(digest))


def _full(pack: Pack) -> bool:
    size = pack.data.stat().st_size
    if size != pack.content_size:
        _log.error("pack file %s has %d bytes, not %d; it is not mounted", pack.data, size, pack.content_size)
    return size == pack.content_size
