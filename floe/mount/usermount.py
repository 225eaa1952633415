"""Models mounted by a user who is not root: each by a server of its own, through fusermount3.

A user can make no private mounts and no binds, so there is no tree below the run directory: the server's mount is the
one at the mountpoint. The record is that of modelmount.py, with the server's name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from floe.mount.holders import holders_hint
from floe.mount.modelmount import ModelMount, check_place
from floe.mount.mountinfo import MountEntry, mount_at, read_mounts
from floe.mount.refusals import refusal
from floe.mount.runner import PORTABLE_COMMAND, MountRunner, OperationError
from floe.mount.state import RunState, known_fields
from floe.mount.trees import Tree
from floe.store.errors import (
    AccessDeniedError,
    BusyError,
    DeadlineError,
    FloeError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.mounttable import PORTABLE_TYPE
from floe.store.process import is_alive

_DEADLINE = 30.0  # seconds for a mount; the cache may have to be taken over from another
_WAIT = 60.0  # seconds for another mount or unmount of a model
_END = 15.0  # seconds that a server gets to end, with what it has yet to write to the cache


def mount_for_user(tree: Tree, mountpoint: Path, state: RunState, store: dict[str, Any], *, model: str) -> ModelMount:
    """Show `tree` at `mountpoint`, an empty directory or a new one; packs are read by `store` (floe.fuse.portable).

    BadInputError, BusyError as for `modelmount.mount_model`; UnsupportedError, AccessDeniedError, UnavailableError.
    Nothing stays mounted then.
    """
    _require_fusermount()
    place = os.path.realpath(mountpoint)
    with state.lock("models", _WAIT):
        made = check_place(place)
        record = ModelMount(place, tree.digest, model, False, made, state.boot)
        file = state.models / f"{record.id}.json"
        try:
            state.write(file, asdict(record))
            runner = MountRunner(_DEADLINE, state.stuck, PORTABLE_COMMAND)
            try:
                answer = runner.run(
                    "mount",
                    source=os.path.realpath(tree.image),
                    target=place,
                    store=store,
                    log=str(state.portable_log),
                )
            except OperationError as error:
                raise _refusal(error, place, state) from error
            record = replace(record, server=answer["server"])
            state.write(file, asdict(record))
        except BaseException:
            mount = _mount_of_ours(place)
            if mount is not None:
                _fusermount(mount)
            file.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):
                    Path(place).rmdir()
            raise
    return record


def umount_for_user(mountpoint: Path, state: RunState) -> None:
    """Undo `mount_for_user`, and wait until its server ended.

    NotFoundError when no model is mounted there; BusyError while files are open; DeadlineError when the server stays.
    """
    place = os.path.realpath(mountpoint)
    with state.lock("models", _WAIT):
        probe = ModelMount(place, "", "", False, False, state.boot)
        file = state.models / f"{probe.id}.json"
        found = state.read(file)
        if found is None:
            raise NotFoundError(f"no model is mounted at {mountpoint}", hint="`floe status` lists what is mounted")
        record = ModelMount(**known_fields(ModelMount, found))
        mount = _mount_of_ours(place)
        if mount is not None:
            _fusermount(mount)
        until = time.monotonic() + _END
        while record.server and is_alive(record.server):
            if time.monotonic() > until:
                what = f"{mountpoint} is unmounted, but its server {record.server.partition('.')[0]} does not end"
                raise DeadlineError(what, hint=f"see {state.portable_log}")
            time.sleep(0.01)
        file.unlink(missing_ok=True)
        if record.made:
            with contextlib.suppress(OSError):  # somebody put something into it
                Path(place).rmdir()


def _require_fusermount() -> None:
    if shutil.which("fusermount3") is None:
        raise UnsupportedError(
            "mounting without root needs fusermount3, which is not installed",
            hint="install it (Debian and Ubuntu: the package fuse3)",
        )


def _mount_of_ours(place: str) -> MountEntry | None:
    mount = mount_at(place, read_mounts())
    return mount if mount is not None and mount.fstype == PORTABLE_TYPE else None


def _fusermount(mount: MountEntry) -> None:
    done = subprocess.run(
        ["fusermount3", "-u", mount.target], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    words = done.stderr.strip()
    if done.returncode and "busy" in words:
        raise BusyError(f"{mount.target} is in use", hint=holders_hint(mount))
    if done.returncode:
        raise UnavailableError(f"{mount.target} cannot be unmounted: {words}", hint="unmount it yourself")


def _refusal(error: OperationError, place: str, state: RunState) -> FloeError:
    what = f"{place} cannot be mounted"
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(f"{what}: {error}", hint="this user must be allowed to read and write /dev/fuse")
    if error.errno == errno.EIO and not error.hint:
        return UnavailableError(
            f"{what}: {error}", hint=f"the directory must be yours; {state.portable_log} may say more"
        )
    return refusal(error, what)
