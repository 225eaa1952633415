"""Finding out, when a pack is first used, what of it may be believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from floe.store.cache.bitmap import Bitmap
from floe.store.cache.cached_pack import CachedPack
from floe.store.cache.durable import sync_folder
from floe.store.cache.node_cache import NodeCache
from floe.store.cache.shares import is_no_mount
from floe.store.cache.usage import Usage
from floe.store.errors import DiskError, NotFoundError


def load_pack(
    cache: NodeCache, pack_id: str, usage: Usage, boot_id: str, opened: Callable[[CachedPack], None]
) -> CachedPack:
    """The frames of a pack that are on disk, counted in `usage`.

    OSError, NotFoundError (no bitmap and no index), DiskError: the file was cut or grew below a native mount, which would read
    zeros of what is done to it.
    """
    folder = cache.folder(pack_id)
    found = _read_bitmap(folder)
    if found is not None and found.boot_id == boot_id:
        # Whoever wrote this in this boot may have been killed before it was on disk, where the file may be clean yet.
        found.clean = True
    bits = found or _fresh(cache, pack_id, boot_id)
    complete = (folder / "complete").exists()
    try:
        status = (folder / "data").stat()
    except FileNotFoundError:
        status = cache.data_path(pack_id).stat()
        bits = _fresh(cache, pack_id, boot_id)
        complete = _revoke(folder, complete=complete)
    if status.st_size != bits.content_size:
        # Somebody cut the file, or its bitmap is another pack's: nothing in it can be believed. The bitmap goes before
        # the data, for good: the next writer would find the file's size right again.
        complete = _revoke(folder, complete=complete)
        mounted = _is_mounted(cache, pack_id)
        bits = _fresh(cache, pack_id, boot_id)
        if mounted and status.st_size != bits.content_size:
            raise DiskError(
                f"{folder / 'data'} has {status.st_size} bytes instead of {bits.content_size}, and a tree is mounted on it",
                hint="its content comes from the store; it is cached anew when the mounts and containers of that tree end",
            )
        (folder / "bitmap").unlink(missing_ok=True)
        sync_folder(folder)
        if not mounted:
            os.truncate(folder / "data", 0)
            os.truncate(folder / "data", bits.content_size)
    pack = CachedPack(pack_id, folder, bits, usage, opened)
    pack.complete = complete
    usage.add(bits.content_size if complete else bits.held())
    pack.load(boot_id, usage.now, 0 if not complete and _is_mounted(cache, pack_id) else status.st_blocks * 512)
    return pack


def _is_mounted(cache: NodeCache, pack_id: str) -> bool:
    """Whether a native mount may lie on the data; to be asked after `complete` is gone, since pins come before that is."""
    return any(not is_no_mount(pin) for pin in cache.pins(pack_id))


def _read_bitmap(folder: Path) -> Bitmap | None:
    try:
        return Bitmap.decode((folder / "bitmap").read_bytes())
    except FileNotFoundError:
        return None


def _fresh(cache: NodeCache, pack_id: str, boot_id: str) -> Bitmap:
    index = cache.index(pack_id)
    if index is None:
        raise NotFoundError(f"pack {pack_id} has no index in {cache.root}", hint="fetch its tree again")
    return Bitmap(index.frame_size, index.content_size, boot_id)


def _revoke(folder: Path, *, complete: bool) -> bool:
    if complete:
        (folder / "complete").unlink(missing_ok=True)
        sync_folder(folder)
    return False
