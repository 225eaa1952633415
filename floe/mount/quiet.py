"""Is a tree safe to unmount, and is it gone afterwards?

An unmount waits in the kernel for reads that are in flight below it, and with it `sync` and others (seen): so it is
not begun. A superblock lives on after its unmount while another mount namespace or an overlay uses it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from floe.mount.loop import backing_file
from floe.mount.mountinfo import MountEntry, mount_at, read_mounts
from floe.mount.runner import MountRunner, OperationError
from floe.mount.state import PACKFS, MountRecord
from floe.store.errors import BusyError, UnavailableError
from floe.store.mounttable import TREE_TYPES
from floe.store.process import is_alive

_DETACH = 1.0  # seconds that loop devices get to be detached
_AGAIN = 0.02  # seconds between two questions
_END = 5.0  # seconds that the server of a portable mount gets to end
_BDI = Path("/sys/class/bdi")


class Packfs(Protocol):
    """What the mounter asks the pack filesystem (floe.protos.packfs_control.PackfsClient); UnavailableError."""

    def ping(self) -> int:
        """The worker's process id."""
        ...

    def unanswered(self, pack_ids: Iterable[str]) -> tuple[int, frozenset[int]]:
        """How many reads on these packs are not answered, with all that no worker has taken; the numbers of those taken."""
        ...


def packfs_device(run_dir: Path) -> str:
    """`major:minor` of the pack filesystem mounted below `run_dir`; empty when there is none."""
    mount = mount_at(str(run_dir / "packs"), read_mounts())
    return mount.device if mount and mount.fstype.startswith("fuse") else ""


def ensure_quiet(
    record: MountRecord, run_dir: Path, packfs: Packfs, runner: MountRunner, *, patience: float = 0.0
) -> None:
    """BusyError unless no read of the tree is in flight, or its connection is dead. DeadlineError.

    Reads are known by their packs, which other trees may share and have read all the time. So it is enough that all that were in
    flight at one moment are answered, within `patience` seconds: whoever reads this tree later keeps it busy by an open file.
    """
    if record.mode != PACKFS:
        return  # a local disk answers by itself
    what = f"tree {record.digest}"
    if record.packfs_device == packfs_device(run_dir):
        try:
            left = _unanswered(record, packfs, patience)
        except UnavailableError:
            pass  # no worker now: ask the kernel
        else:
            if left:
                raise BusyError(f"{what} has {left} reads in flight", hint="try again when they are answered")
            return
    try:
        minor = int(record.packfs_device.partition(":")[2])
        waiting = runner.run("waiting", minor=minor)["waiting"]
    except (OperationError, ValueError):
        waiting = -1
    if waiting:  # None: the connection is gone; 0: nothing waits on it, as after an abort
        raise BusyError(
            f"{what} may have reads in flight, and its pack filesystem does not answer",
            hint="start it again with `floe packfs`, or end it with --force, then try again",
        )


def _unanswered(record: MountRecord, packfs: Packfs, patience: float) -> int:
    """How many of the reads that are in flight now are not answered in time."""
    until = time.monotonic() + patience
    count, reads = packfs.unanswered(record.packs)
    known = count == len(reads)  # else some of them have no number yet
    while count and time.monotonic() < until:
        time.sleep(_AGAIN)
        now, then = packfs.unanswered(record.packs)
        if known:
            reads &= then
            count = len(reads)
        else:
            count, reads, known = now, then, now == len(then)
    return count


def is_mount_of(record: MountRecord, mount: MountEntry) -> bool:
    """Whether `mount` shows the superblock of `record`. Device numbers are used again: ask `superblock_alive` as well."""
    return (
        mount.fstype in TREE_TYPES
        and mount.device == record.device
        and (not record.server or mount.source == f"floe:{record.server}")
    )


def superblock_alive(record: MountRecord, mounts: list[MountEntry]) -> bool:
    """Whether the kernel still has the superblock, in whatever mount namespace or overlay."""
    if record.server:  # it ends with its superblock; killed, it leaves a dead one
        return is_alive(record.server) or any(is_mount_of(record, mount) for mount in mounts)
    if record.loops:
        return any(backing_file(device) == file for device, file in record.loops)
    if record.bdi:
        return (_BDI / record.bdi).exists()  # these names are never used twice
    return any(is_mount_of(record, mount) for mount in mounts)


def lives_on(record: MountRecord) -> bool:
    """Whether the superblock outlives its unmount. Loop devices and portable servers go a moment later: that is no life."""
    until = time.monotonic() + (_DETACH if record.loops else _END if record.server and is_alive(record.server) else 0)
    while superblock_alive(record, read_mounts()):
        if time.monotonic() >= until:
            return True
        time.sleep(_DETACH / 50)
    return False
