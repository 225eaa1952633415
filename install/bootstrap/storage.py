"""File systems for the cache: made on disks that are empty, mounted, and taken away again."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from bootstrap.disks import FORMAT, Choice, Use, why_not
from bootstrap.errors import NodeError
from bootstrap.node import ARRAY_NAME, LABEL, MOUNTS, Disk, Node, mounts_from
from bootstrap.record import Record
from bootstrap.survey import mark, survey
from bootstrap.system import find, read, run, say

ARRAY = "/dev/md/floe"
_OPTIONS = "noatime,nodev,nosuid"
_CACHE = "cache"  # the one directory of ours on a file system of ours
_SECONDS = 600.0  # a large disk that is slow to discard


def apply(choice: Choice, record: Record) -> list[str]:
    """Have the cache's directories, and what they lie on; what was done, in words. NodeError."""
    done = []
    for use in choice.uses:
        if use.action == FORMAT:
            done.append(_format(use, record))
        _settle(use, record)
        device = _device(use)
        record.folder(Path(use.mountpoint))
        if _mount(device, use.mountpoint):
            done.append(f"mounted {device} at {use.mountpoint}")
    for directory in choice.directories:
        path = Path(directory)
        if not path.is_dir():
            record.folder(path.parent)
            _note(record, "caches", directory)
            path.mkdir(mode=0o700, exist_ok=True)
    return done


def _format(use: Use, record: Record) -> str:
    """One file system. That it was begun is durable first: what is half done afterwards counts as empty."""
    names = ", ".join(disk.path for disk in use.members)
    for disk in use.members:
        for above in disk.above:  # an array that an earlier run has begun
            run("mdadm", "--stop", above.path, check=False)
    _look_again(use, record)
    for disk in use.members:
        _note(record, "formatting", mark(disk.identity))
    say(f"formatting {names}")
    device = use.members[0].path
    if use.raid:
        device = ARRAY
        _make_array(use)
    # Packs are few and large; without -m nobody but root could fill it, and only root does.
    options = ("-q", "-F", "-m", "0", "-i", "65536", "-L", use.label, "-E", "lazy_itable_init=1,lazy_journal_init=1")
    run("mkfs.ext4", *options, device, seconds=_SECONDS)
    _settle(use, record)
    return f"formatted {names}" + (" as one array" if use.raid else "")


def _settle(use: Use, record: Record) -> None:
    """What was begun is at its end: from now on a disk that looks half done is somebody else's."""
    for disk in use.members:
        if _forget_begun(disk.identity, record):
            _note(record, "formatted", disk.identity)
            record.save()


def _look_again(use: Use, record: Record) -> None:
    """Right before anything is written: each disk is still empty, and nobody has it open."""
    node = survey([disk.path for disk in use.members], record.data["formatting"])
    for disk in use.members:
        now = node.disk(disk.path)
        reason = "is gone" if now is None or now.identity != disk.identity else why_not(node, now)
        if not reason:
            reason = _opened(disk.path)
        if reason:
            raise NodeError(f"{disk.path} {reason}", "run this again: it looks anew at what there is")


def _opened(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return f"cannot be had alone: {error.strerror}"
    return ""


def _make_array(use: Use) -> None:
    if find("mdadm") is None:
        raise NodeError("there is no mdadm to make an array with", "apt-get install mdadm, or leave --raid0 out")
    members = [disk.path for disk in use.members]
    options = (
        "--run",
        f"--name={ARRAY_NAME}",
        "--homehost=any",
        "--level=0",
        "--metadata=1.2",
        f"--raid-devices={len(members)}",
    )
    run("mdadm", "--create", ARRAY, *options, *members, seconds=_SECONDS)


def _device(use: Use) -> str:
    if not use.raid:
        return use.members[0].path
    above = next((one.path for one in use.members[0].above if one.kind == "raid0"), ARRAY)
    return above if Path(above).exists() else ARRAY


def _mount(device: str, target: str) -> bool:
    mounted = [one.number for one in mounts_from(read(Path("/proc/self/mountinfo"))) if one.target == target]
    if mounted:
        number = Path(device).stat().st_rdev
        if mounted[-1] != f"{os.major(number)}:{os.minor(number)}":
            raise NodeError(
                f"{target} has something else mounted than {device}", f"umount {target}, then run this again"
            )
        return False
    run("mount", "-t", "ext4", "-o", _OPTIONS, device, target)
    return True


def _note(record: Record, what: str, value: str) -> None:
    found = record.data.setdefault(what, [])
    if value not in found:
        found.append(value)
        record.save()


def _forget_begun(identity: str, record: Record) -> bool:
    """Whether its formatting was begun, in this boot or an earlier one."""
    before = record.data["formatting"]
    record.data["formatting"] = [one for one in before if one.rpartition("@")[0] != identity]
    return len(record.data["formatting"]) < len(before)


# undo


def remove(record: Record) -> list[str]:
    """Take away caches and file systems that were made here; the disks are empty afterwards. What stayed, in words."""
    left = []
    for directory in record.data.get("caches", []):
        if not directory.startswith(MOUNTS):  # those go with their file system
            shutil.rmtree(directory, ignore_errors=True)
    begun = {one.rpartition("@")[0] for one in record.data["formatting"]}
    ours = {*record.data.get("formatted", ()), *begun}
    paths = [disk.path for disk in _all(survey([], [])) if disk.identity in ours]
    for identity in sorted(ours):
        node = survey(paths, [])  # anew: the members of an array go together
        alike = [disk for disk in _all(node) if disk.identity == identity]
        if len(alike) == 1:
            left += _empty(alike[0], _beside(alike[0], node, ours), record)
        elif alike:
            names = ", ".join(disk.path for disk in alike)
            left.append(f"{names} cannot be told apart, and one was formatted for the cache: they stay as they are")
        if alike:
            record.data["formatted"] = [one for one in record.data.get("formatted", ()) if one != identity]
            _forget_begun(identity, record)
            record.save()
    left += [f"a disk that was formatted is gone: {one}" for one in record.data.get("formatted", ())]
    return left


def _all(node: Node) -> list[Disk]:
    return [one for disk in node.disks for one in disk.tree()]


def _beside(disk: Disk, node: Node, ours: Collection[str]) -> list[Disk]:
    """The disks of ours that an array on this one has as well, itself among them."""
    arrays = {above.path for above in disk.above}
    return [one for one in _all(node) if one.identity in ours and arrays & {above.path for above in one.above}]


def _empty(disk: Disk, members: Sequence[Disk], record: Record) -> list[str]:
    """Make a disk of ours as it was found. One that others have put something on since is theirs."""
    begun = mark(disk.identity) in record.data["formatting"]
    file_system = next((one for one in disk.tree() if one.ours), None)
    foreign = [one for one in disk.tree() for point in one.mountpoints if not point.startswith(MOUNTS)]
    if foreign or (file_system is None and not disk.empty and not (begun and disk.half_done)):
        return [f"{disk.path} was formatted for the cache once, holds something else now, and stays as it is"]
    if file_system is not None:
        points = list(file_system.mountpoints)
        if not begun:
            try:
                others = _others(file_system, points, record)
            except NodeError as error:
                return [f"{disk.path} cannot be looked at, and stays as it is: {error}"]
            if others:
                return [f"{disk.path} has more on it than the cache, {', '.join(others[:5])}, and stays"]
        for point in points:
            _unmount(point)
            with contextlib.suppress(OSError):
                Path(point).rmdir()
    for one in (disk, *members):
        # what is half emptied, or left of an array, looks like half formatted
        _note(record, "formatting", mark(one.identity))
    for above in disk.above:
        if above.kind == "raid0":
            run("mdadm", "--stop", above.path, check=False)
    if disk.fstype == "linux_raid_member":
        run("mdadm", "--zero-superblock", disk.path, check=False)
    say(f"emptying {disk.path}")
    # Discarded blocks read as zeros on most disks; on others zeros are written, which some do without taking any time.
    for options in (("-f",), ("-f", "-z")):
        run("blkdiscard", *options, disk.path, check=False, seconds=3600)
        if _is_clean(disk.path):
            return []
    run("wipefs", "--all", disk.path, check=False)
    return [f"{disk.path} has no file system any more, but cannot be made all zeros"]


def _others(file_system: Disk, points: list[str], record: Record) -> list[str]:
    """What a file system of ours holds beside the cache; where it holds anything the cache goes alone. NodeError.

    One that is not mounted is, where it belongs, which is put into `points`, and undone where it has to stay.
    """
    mounted = list(points)
    if not mounted:
        point = MOUNTS + file_system.label[len(LABEL) :]
        record.folder(Path(point))
        _mount(file_system.path, point)
        points.append(point)
    place = Path(points[0])
    found = sorted(path.name for path in place.iterdir() if path.name not in (_CACHE, "lost+found"))
    if found:
        shutil.rmtree(place / _CACHE, ignore_errors=True)
        if not mounted:
            _unmount(points[0])
    return found


def _is_clean(path: str) -> bool:
    found = survey([path], []).disk(path)
    return found is not None and found.empty


def _unmount(point: str) -> None:
    """Try for a while: who has just ended may still be letting go."""
    for _ in range(20):
        if run("umount", point, check=False).returncode == 0:
            return
        time.sleep(0.5)
    raise NodeError(
        f"{point} cannot be unmounted: something uses it", f"fuser -vm {point} names it; end that, then run this again"
    )
