"""Models mounted for users: `floe model mount` and `floe umount`.

A record `<run dir>/models/<id>.json` of each says what lies where, and whether the pack filesystem was started for it:
then it is stopped with the last model that needs it, unless something else uses it by then. The last unmount also
clears up what killed commands left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from floe.mount.mounter import TreeMounter
from floe.mount.mountinfo import mount_at, read_mounts
from floe.mount.quiet import packfs_device, superblock_alive
from floe.mount.state import PACKFS, known_fields
from floe.mount.trees import Tree
from floe.protos.packfs_control import started as tell_started
from floe.store.errors import BadInputError, BusyError, FloeError, NotFoundError, UnavailableError
from floe.store.ids import hexdigest

_log = logging.getLogger(__name__)
_WAIT = 60.0  # seconds for another mount or unmount of a model; it may start or stop the pack filesystem
_RETURN = 15.0  # seconds for a pack filesystem that answers nobody to be served again
_POLL = 0.1


@dataclass(frozen=True)
class ModelMount:
    """A model at a mountpoint. `made`: the directory was made for it. `boot` is the boot id. `volume`: see volumemount.py."""

    mountpoint: str
    tree: str
    model: str
    started_packfs: bool
    made: bool
    boot: str
    server: str = ""  # of an ordinary user's mount, see usermount.py
    volume: str = ""  # the id of a CSI volume; empty for what a user mounted

    @property
    def id(self) -> str:
        """Names the record: 32 hex digits of the mountpoint's digest."""
        return _id(self.mountpoint)

    @property
    def owner(self) -> str:
        """The tree's owner."""
        return f"model-{self.id}"


def mount_model(
    tree: Tree,
    mountpoint: Path,
    mounter: TreeMounter,
    *,
    model: str,
    start_packfs: Callable[[], None],
    stop_packfs: Callable[[], None],
    volume: str = "",
) -> ModelMount:
    """Show `tree` at `mountpoint`, an empty directory or a new one whose parent exists; `model` is for people.

    `start_packfs` is called when the tree is not whole in the node cache and no pack filesystem runs, nor comes back within
    some seconds; it returns when that serves. BusyError: something is mounted there. BadInputError: no empty directory. Any error of
    `TreeMounter.mount`; nothing stays mounted or running then.
    """
    place = os.path.realpath(mountpoint)
    with mounter.state.lock("models", _WAIT):
        for line in mounter.sweep():  # on a machine without a snapshotter nobody else does: pins of before a reboot
            _log.info("%s", line)
        made = check_place(place)
        started = False
        try:
            if any(not pack.complete for pack in tree.packs) and not _packfs_runs(mounter):
                start_packfs()
                started = True
            record = ModelMount(place, tree.digest, model, started, made, mounter.state.boot, volume=volume)
            mounter.state.write(_file(mounter, record.id), asdict(record))
            try:
                mounter.mount(tree, record.owner)
                mounter.bind(tree.digest, Path(place), model=True)
                tell_started(mounter.run_dir, place, model, [tree.digest])
            except BaseException:
                with contextlib.suppress(BusyError):
                    mounter.release(tree.digest, record.owner)
                _file(mounter, record.id).unlink(missing_ok=True)
                raise
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    Path(place).rmdir()
            if started:
                stop_packfs()
            raise
    return record


def umount_model(mountpoint: Path, mounter: TreeMounter, *, stop_packfs: Callable[[], None]) -> bool:
    """Undo `mount_model`; True when that stopped the pack filesystem.

    NotFoundError when no model is mounted there. BusyError while files of it are open (the hint says by whom), at once, or
    when reads in flight are not answered within the mounter's patience; it stays mounted then.
    """
    place = os.path.realpath(mountpoint)
    with mounter.state.lock("models", _WAIT):
        record = _read(mounter, _file(mounter, _id(place)))
        if record is None:
            raise NotFoundError(f"no model is mounted at {mountpoint}", hint="`floe status` lists what is mounted")
        if mount_at(place, read_mounts()) is not None:
            mounter.ensure_removable(record.tree, record.owner, place)
            mounter.unbind(Path(place))
        mounter.release(record.tree, record.owner)
        _file(mounter, record.id).unlink(missing_ok=True)
        if record.made:
            with contextlib.suppress(OSError):  # somebody put something into it
                Path(place).rmdir()
        _sweep_when_idle(mounter)
        stop = record.started_packfs and _nobody_needs_packfs(mounter)
        if not mounter.mounts():
            mounter.home.remove()  # leave the machine as it was
        if stop:
            stop_packfs()
        return stop


def mounted_model(mountpoint: Path, mounter: TreeMounter) -> ModelMount | None:
    """The record of a model mounted there since this boot; its mount may have been lost since."""
    return _read(mounter, _file(mounter, _id(os.path.realpath(mountpoint))))


def restore_model(record: ModelMount, tree: Tree, mounter: TreeMounter) -> None:
    """Have a recorded mount as it was made; nothing happens where it is well. `tree` is the record's.

    BusyError: something else is mounted there. Any error of `TreeMounter.mount`; the record stays then. NotFoundError: it was
    unmounted meanwhile.
    """
    with mounter.state.lock("models", _WAIT):
        found = _read(mounter, _file(mounter, record.id))
        if found is None or found.tree != record.tree:
            raise NotFoundError(f"no model is mounted at {record.mountpoint} any more")
        Path(record.mountpoint).mkdir(exist_ok=True)
        mounter.mount(tree, record.owner)
        mounter.bind(record.tree, Path(record.mountpoint), model=True)


def model_mounts(mounter: TreeMounter) -> list[ModelMount]:
    """The models mounted for users since this boot."""
    found = [_read(mounter, path) for path in sorted(mounter.state.models.glob("*.json"))]
    return [record for record in found if record is not None]


def check_place(place: str) -> bool:
    """Whether the directory was made. Only what is empty and no mountpoint will do."""
    if mount_at(place, read_mounts()) is not None:
        raise BusyError(f"{place} is a mountpoint already", hint="`floe umount` it, or choose another directory")
    try:
        Path(place).mkdir()
    except FileExistsError:
        pass
    except OSError as error:
        hint = "make the directory above it first"
        raise BadInputError(f"{place} cannot be made: {error.strerror}", hint=hint) from error
    else:
        return True
    try:
        empty = not any(Path(place).iterdir())
    except OSError as error:
        raise BadInputError(f"{place}: {error.strerror}", hint="give an empty directory") from error
    if not empty:
        raise BadInputError(f"{place} is not empty", hint="a mount would hide what is in it: give an empty directory")
    return False


def _packfs_runs(mounter: TreeMounter) -> bool:
    """Whether the pack filesystem serves, or does so soon.

    While its worker or both its processes are being replaced it is mounted, not dead, and answers nobody. Somebody holds it
    then, systemd perhaps: one started here could not have it, and would take the mount away from under its readers.
    """
    until = time.monotonic() + _RETURN
    asked = False
    while packfs_device(mounter.run_dir):
        with contextlib.suppress(UnavailableError):
            mounter.packfs.ping()
            return True
        if not asked and mounter.packfs_is_dead():  # waits for its return, too
            return False
        asked = True
        if time.monotonic() > until:  # a keeper that was stopped: the next one takes over from it
            return False
        time.sleep(_POLL)
    return False


def _sweep_when_idle(mounter: TreeMounter) -> None:
    """Clear up what killed commands left: no daemon does it on a machine without one.

    Only when nobody owns a tree. Else trees are at work, and whoever owns them sweeps; a command need not wait for them.
    """
    try:
        if not any(mounter.uses(record.digest) for record in mounter.mounts()):
            for line in mounter.sweep():
                _log.info("%s", line)
    except (FloeError, OSError) as error:
        _log.warning("what killed commands may have left stays: %s", error)


def _nobody_needs_packfs(mounter: TreeMounter) -> bool:
    """Else, another model takes over that it was started for a model."""
    mounts = read_mounts()
    lingering = [record for _, record in mounter.state.lingering() if superblock_alive(record, mounts)]
    needed = {record.digest for record in [*mounter.mounts(), *lingering] if record.mode == PACKFS}
    for other in model_mounts(mounter):
        if other.tree in needed:
            mounter.state.write(_file(mounter, other.id), asdict(replace(other, started_packfs=True)))
            return False
    return not needed


def _id(place: str) -> str:
    return hexdigest(os.fsencode(place))[:32]


def _file(mounter: TreeMounter, record_id: str) -> Path:
    return mounter.state.models / f"{record_id}.json"


def _read(mounter: TreeMounter, path: Path) -> ModelMount | None:
    found: dict[str, Any] | None = mounter.state.read(path)
    return None if found is None else ModelMount(**known_fields(ModelMount, found))
