"""Where the cache shall lie: a function of the node and of what was asked for. Nothing here looks at anything or changes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bootstrap.errors import NodeError
from bootstrap.flags import AUTO, NONE
from bootstrap.node import LABEL, MOUNTS, Disk, Mount, Node
from bootstrap.reserve import Threshold, highest_threshold, room_for_others

OWN, PLATFORM, BOOT = "own", "platform", "boot"
FORMAT, REUSE = "format", "reuse"
DEFAULT_CACHE = "/var/cache/floe"
_SMALLEST = 8 << 30  # a pack is up to 4 GiB; smaller disks are never chosen, only named
_NUMBERS = re.compile(r"(\d+)")
# Where the platform keeps what pods write and what images are unpacked to.
_OF_PLATFORM = ("/var/lib/kubelet", "/var/lib/containerd")


@dataclass(frozen=True)
class Use:
    """A file system for the cache, and its place. `action`: FORMAT or REUSE; `members`: one disk, or those of an array."""

    label: str
    members: tuple[Disk, ...]
    action: str
    raid: bool = False

    @property
    def mountpoint(self) -> str:
        """Where it is mounted."""
        return MOUNTS + self.label[len(LABEL) :]


@dataclass(frozen=True)
class Choice:
    """`kind`: disks of its OWN, a file system of the PLATFORM's on local disks, or what holds /var (BOOT).

    `directories`: of the cache, at least one; `min_free`: for the setting, empty for none; `notes` are worth knowing,
    `warnings` worth mending.
    """

    kind: str
    directories: tuple[str, ...]
    uses: tuple[Use, ...] = ()
    min_free: str = ""
    size: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def to_format(self) -> list[Disk]:
        """What loses all that is on it, which is nothing."""
        return [disk for use in self.uses if use.action == FORMAT for disk in use.members]


def choose(node: Node, asked: str | Sequence[str], *, raid0: bool) -> Choice:
    """Where the cache shall lie. `asked`: AUTO, NONE or devices. NodeError for a device that cannot be used."""
    if not isinstance(asked, str):
        return _own(node, [_named(node, path) for path in asked], raid0=raid0, left=[])
    left: list[str] = []
    if asked == AUTO:
        usable = []
        for disk in sorted(node.disks, key=_natural):
            if disk.local_flash:
                reason = why_not(node, disk)
                if not reason and disk.size < _SMALLEST and not disk.ours:
                    reason = f"is smaller than {_SMALLEST >> 30} GiB"
                if reason:
                    left.append(f"{disk.path} {reason}: left alone")
                else:
                    usable.append(disk)
        if usable:
            return _own(node, usable, raid0=raid0, left=left)
        found = _platform(node, left)
        if found is not None:
            return found
    return _boot(node, left, wanted=asked != NONE)


def why_not(node: Node, disk: Disk) -> str:
    """Why a disk cannot be taken; empty when it can."""
    points = [point for one in disk.tree() for point in one.mountpoints]
    foreign = [point for point in points if not point.startswith(MOUNTS)]
    if foreign:
        return f"is in use, mounted at {', '.join(foreign)}"
    if disk.ours or _array(disk) is not None:
        return ""
    if points:
        return f"is in use, mounted at {', '.join(points)}"
    if disk.read_only:
        return "is read-only"
    if disk.held:
        return "is in use: something has it for itself"
    if _begun(node, disk):
        return ""
    if disk.above:
        return f"has {', '.join(one.path for one in disk.above)} on it"
    if disk.fstype:
        return f"holds data ({disk.fstype})"
    if not disk.empty:
        return "holds data: it has no file system, and is not all zeros either"
    return ""


def _begun(node: Node, disk: Disk) -> bool:
    """Whether an earlier run has begun to format it, and nobody has put anything on it since. Nothing of ours was, either."""
    unused = not any(one.mountpoints for one in disk.tree())
    alike = [one for whole in node.disks for one in whole.tree() if one.identity == disk.identity]
    return (
        disk.identity in node.being_formatted
        and len(alike) == 1
        and unused
        and disk.half_done
        and all(one.kind == "raid0" and one.half_done for one in disk.above)
    )


def _named(node: Node, path: str) -> Disk:
    disk = node.disk(path)
    if disk is None:
        raise NodeError(f"there is no block device {path}", "lsblk -p lists those that are there")
    if disk.kind not in ("disk", "part", "loop"):
        raise NodeError(f"{path} is no disk but {disk.kind}", "name a disk, or a partition")
    reason = why_not(node, disk)
    if reason:
        hint = "name another disk"
        if not any(one.mountpoints for one in disk.tree()) and not disk.read_only:
            hint += f"; if nobody needs what is on it: blkdiscard -f {path}, or where the disk has no discard, blkdiscard -f -z {path}"
        raise NodeError(f"{path} {reason}", hint)
    return disk


def _own(node: Node, disks: list[Disk], *, raid0: bool, left: list[str]) -> Choice:
    if len({disk.path for disk in disks}) < len(disks):
        raise NodeError("two of the names in --disks are of one disk", "name each disk once")
    begun = {disk.path for disk in disks if _begun(node, disk)}
    arrays = [disk for disk in disks if _array(disk) is not None and disk.path not in begun]
    singles = [disk for disk in disks if disk.ours and disk.path not in begun]
    fresh = [disk for disk in disks if disk not in arrays and disk not in singles]
    _check_labels(singles)
    notes, warnings = list(left), []
    if arrays and (singles or fresh):
        others = ", ".join(disk.path for disk in (*singles, *fresh))
        notes.append(f"{others}: not in the array that is there, and left alone; --uninstall first makes one of all")
        singles, fresh = [], []
    if raid0 and singles:
        raise NodeError(
            f"{singles[0].path} is a cache disk of its own already, no part of an array",
            "--uninstall first, then make the array; or leave --raid0 out",
        )
    uses: list[Use] = []
    if arrays:
        array = _array(arrays[0])
        assert array is not None
        uses.append(Use(array.label, tuple(arrays), REUSE, raid=True))
    uses += [Use(disk.label, (disk,), REUSE) for disk in singles]
    if raid0 and len(fresh) > 1:
        uses.append(Use(f"{LABEL}0", tuple(fresh), FORMAT, raid=True))
    else:
        if raid0 and fresh:
            notes.append(f"there is one disk, {fresh[0].path}: an array needs two, so it is used as it is")
        taken = {use.label for use in uses}
        free = (label for number in range(1000) if (label := f"{LABEL}{number}") not in taken)
        uses += [Use(next(free), (disk,), FORMAT) for disk in fresh]
    for disk in disks:
        if disk.network:
            warnings.append(
                f"{disk.path} is {disk.network}, a disk over the network: its reads and writes share the network with the store"
            )
        if disk.size < _SMALLEST:
            warnings.append(f"{disk.path} has {disk.size >> 20} MiB, and one pack may have 4 GiB: little will be kept")
    uses.sort(key=lambda use: int(use.label[len(LABEL) :] or 0))
    directories = tuple(f"{use.mountpoint}/cache" for use in uses)
    # Nobody else writes there, so little is left to others.
    return Choice(OWN, directories, tuple(uses), "3%", "95%", tuple(notes), tuple(warnings))


def _check_labels(disks: list[Disk]) -> None:
    """NodeError where two go by one name: one is a copy, or comes from another machine."""
    for disk in disks:
        same = [one.path for one in disks if one.label == disk.label]
        if len(same) > 1:
            raise NodeError(
                f"{', '.join(same)} are both called {disk.label}",
                f"e2label {same[-1]} {LABEL}N gives one another number; or take one of them out",
            )


def _array(disk: Disk) -> Disk | None:
    """The array with our file system that it is a part of."""
    return next((one for one in disk.above if one.kind == "raid0" and one.ours), None)


def _platform(node: Node, left: list[str]) -> Choice | None:
    """A file system on local disks where the platform keeps what pods and images write, as GKE's ephemeral storage does."""
    root = node.mount_of("/")
    for path in _OF_PLATFORM:
        mount = node.mount_of(path)
        if mount is None or (root is not None and mount.number == root.number):
            continue
        below = node.below(mount.number)
        if not below or not all(disk.local_flash for disk in below):
            continue
        whole = [one.target for one in node.mounts if one.number == mount.number and one.root == "/"]
        place = min(whole, key=len, default=mount.target)
        threshold = highest_threshold(node.kubelet)
        text = f"{', '.join(disk.path for disk in below)} hold {path}, the platform's: the cache goes to {place}, beside it"
        # What kubelet itself keeps in its directory has fixed names; containerd's is swept by containerd alone.
        return Choice(
            PLATFORM,
            (f"{place.rstrip('/')}/floe-cache",),
            min_free=room_for_others(threshold, _size(below, mount)),
            notes=(*left, text, _reserve_text(threshold, _size(below, mount))),
        )
    return None


def _boot(node: Node, left: list[str], *, wanted: bool) -> Choice:
    mount = node.mount_of(DEFAULT_CACHE)
    below = node.below(mount.number) if mount is not None else []
    notes, warnings, min_free = list(left), [], ""
    where = f"the cache lies in {DEFAULT_CACHE}, on the disk that holds it" + (
        f" ({', '.join(disk.path for disk in below)})" if below else ""
    )
    network = next((disk.network for disk in below if disk.network), "")
    if network:
        warnings.append(f"{where}: {network}, a disk over the network, whose reads and writes share it with the store")
    elif wanted:
        warnings.append(f"there is no local NVMe disk to be used: {where}")
    else:
        notes.append(where)
    shared = [one for path in _OF_PLATFORM if (one := node.mount_of(path)) is not None]
    if node.kubelet is not None and mount is not None and any(one.number == mount.number for one in shared):
        threshold = highest_threshold(node.kubelet)
        min_free = room_for_others(threshold, _size(below, mount))
        notes.append(_reserve_text(threshold, _size(below, mount)))
    return Choice(BOOT, (DEFAULT_CACHE,), min_free=min_free, notes=tuple(notes), warnings=tuple(warnings))


def _size(below: Sequence[Disk], mount: Mount) -> int:
    return next((one.size for disk in below for one in disk.tree() if one.number == mount.number), 0)


def _reserve_text(threshold: Threshold, total: int) -> str:
    return (
        f"{room_for_others(threshold, total)} of it stay free: below {threshold.text} kubelet removes images or evicts pods "
        f"({threshold.source})"
    )


def _natural(disk: Disk) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(disk.path)]
