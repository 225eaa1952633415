"""Who reads packs for a program: the node's pack filesystem where one runs, else this process, with the cache it may use."""

from __future__ import annotations

from collections.abc import Collection

from floe.cli.model_mount import source
from floe.cli.settings import Settings
from floe.fuse.portable.files import FileReader
from floe.fuse.portable.shared import SharedReader, Source
from floe.fuse.reader import Reader
from floe.store.errors import BusyError
from floe.store.mounttable import mounts_at
from floe.store.trees import LocalTree


def served_reader(settings: Settings, tree: LocalTree, packs: Collection[str] | None = None) -> Reader | None:
    """Reads a tree's packs from the pack filesystem on this node; None when none runs, or this user may not read it.

    It shares the node's cache, and what the page cache holds of it, with all mounts. `packs`: those that are needed, None:
    all. Until it is closed it holds the pack filesystem, as a mount does.
    """
    folder = settings.run_dir / "packs"
    try:
        if not any(mount.fstype.startswith("fuse") for mount in mounts_at(folder)):
            return None
        return FileReader(
            {pack.id: (folder / pack.id, pack.content_size) for pack in tree.packs if packs is None or pack.id in packs}
        )
    except OSError:
        return None


def own_reader(settings: Settings) -> Reader:
    """Reads packs through the cache of `settings`, which this process writes, or shares with the user's process that does.

    BusyError when a daemon writes it.
    """
    try:
        return SharedReader(Source(**source(settings)))
    except BusyError as error:
        hint = "a pack filesystem uses it: read as the user it runs for, or give another cache_dir"
        raise BusyError(str(error), hint=hint) from error
