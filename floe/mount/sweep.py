"""Clears up what died: mounts nobody owns, records and pins without a mount, loop devices without a user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from floe.mount.loop import attached_loops, detach_loop
from floe.mount.mountinfo import mount_at, read_mounts
from floe.mount.quiet import is_mount_of, superblock_alive
from floe.store.cache.durable import SPARE, remove_dead
from floe.store.errors import FloeError
from floe.store.ids import is_hexdigest

if TYPE_CHECKING:
    from floe.mount.mounter import TreeMounter


def sweep(mounter: TreeMounter) -> list[str]:
    """See `TreeMounter.sweep`. Never raises for one thing that cannot be removed: it goes on with the next."""
    said: list[str] = []
    # A pin is written with its tree's lock held, before the mount. So one that is found here, but whose tree is not
    # mounted once we hold that lock, has no mount.
    try:
        pinned = mounter.pins.trees()
    except OSError as error:
        pinned = {}
        said.append(f"pins of trees that are not mounted stay, since the cache cannot be read: {error}")
    for digest in _candidates(mounter, pinned):
        try:
            with mounter.locked(digest):
                _sweep_tree(mounter, digest, pinned.get(digest, []), said)
        except (FloeError, OSError) as error:
            said.append(f"tree {digest} stays: {error}")
    _sweep_loops(mounter, said)
    for root in mounter.cache.roots:
        spare = root / SPARE
        try:
            removed = remove_dead(spare)
        except OSError as error:
            said.append(f"temporary files in {spare} stay: {error}")
        else:
            if removed:
                said.append(f"{removed} temporary files in {spare} that killed processes left: removed")
    return said


def _candidates(mounter: TreeMounter, pinned: Iterable[str]) -> list[str]:
    state = mounter.state
    trees = {path.name for path in state.trees.iterdir()}
    trees |= {record.digest for record in state.records()}
    trees |= {record.digest for _, record in state.lingering()}
    trees |= {path.name for path in state.owner_folders()}
    trees |= set(pinned)
    return sorted(name for name in trees if is_hexdigest(name))


def _sweep_tree(mounter: TreeMounter, digest: str, pinned: list[str], said: list[str]) -> None:
    state = mounter.state
    mounts = read_mounts()
    mounted = mount_at(str(mounter.target(digest)), mounts) is not None
    if mounted:
        if state.owners(digest):
            return
        mounter.unmount(digest)
        said.append(f"tree {digest} was mounted but nobody used it: unmounted")
        mounts = read_mounts()
    record = state.record(digest)
    if mounter.runner.hangs(str(mounter.target(digest))):
        return  # it may be mounted yet
    if record is not None:
        if superblock_alive(record, mounts) and any(is_mount_of(record, entry) for entry in mounts):
            return  # unmounted by someone else, who left binds of it
        mounter.forget(digest, record)
        said.append(f"tree {digest} had a record but no mount: forgotten")
    for path, old in state.lingering(digest):
        if not superblock_alive(old, mounts):
            path.unlink(missing_ok=True)
    had = mounter.pins.of(digest, pinned)
    mounter.pins.drop(digest, pinned, mounts)
    gone = had - mounter.pins.of(digest, pinned)
    if gone:
        said.append(f"tree {digest} pinned {len(gone)} packs without being mounted: unpinned")
    state.forget_stale_owners(digest)
    with contextlib.suppress(OSError):
        mounter.target(digest).rmdir()


def _sweep_loops(mounter: TreeMounter, said: list[str]) -> None:
    """Loop devices on our files that belong to no mount: those of a mount process that was ended halfway."""
    state = mounter.state
    used = {device for record in state.records() for device, _ in record.loops}
    used |= {device for _, record in state.lingering() for device, _ in record.loops}
    # Not the real path of the pack filesystem: asking for it may hang when nobody serves it.
    ours = (*(os.path.realpath(root) + "/" for root in mounter.cache.roots), f"{mounter.run_dir}/packs/")
    for device, file in attached_loops().items():
        if device not in used and file.startswith(ours):
            # One that a mount in the making has open goes with its last user, as it would have anyway.
            with contextlib.suppress(OSError):
                detach_loop(device)
                said.append(f"loop device {device} on {file} belonged to no mount: detached")
