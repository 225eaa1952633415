"""The two descriptors that are the pack filesystem, /dev/fuse and the request slots: made, found again, kept.

As long as one process, or systemd's store, holds both, the mount lives and nothing asked of it is lost.
Nothing here touches files below the mountpoint: without a worker that would wait for ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from floe.fuse import slots
from floe.store import mounttable, process
from floe.store.errors import FloeError, UnsupportedError
from floe.store.process import sd_notify

MOUNTPOINT = "packs"
WORKER_PID = "worker.pid"
KNOWN = "packs.known"
FUSE_FD_ENV, SLOTS_FD_ENV, READY_FD_ENV = "PACKFS_FUSE_FD", "PACKFS_SLOTS_FD", "PACKFS_READY_FD"
EXIT_GONE = 3  # a worker's exit code: the connection was unmounted or aborted
EXIT_BUSY = 4  # likewise: another worker holds the slots
FUSE_NAME, SLOTS_NAME = "floe-fuse", slots.MEMFD_NAME  # in systemd's store

_FSTYPE = "fuse.floe"
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_PIDFD_THREAD = os.O_EXCL
_GONE = (errno.ENOTCONN, errno.ECONNABORTED)
_ASK_SECONDS = 2.0
_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Descriptors:
    """Open descriptors of one mount, whose device number is `device`."""

    fuse: int
    slots: int
    device: tuple[int, int]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount_fresh(run_dir: Path) -> Descriptors:
    """Open /dev/fuse and mount it at `<run_dir>/packs`, which must not be a mountpoint; FloeError when refused."""
    target = run_dir / MOUNTPOINT
    target.mkdir(mode=0o755, exist_ok=True)
    (run_dir / KNOWN).write_bytes(b"")  # node ids of former mounts mean nothing to this one
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            f"cannot open /dev/fuse: {error.strerror}", hint="load the kernel module: modprobe fuse"
        ) from error
    options = f"fd={fuse},rootmode=40500,user_id=0,group_id=0,allow_other,default_permissions,max_read={1 << 20}"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    try:
        _check(_libc.mount(b"floe", bytes(target), _FSTYPE.encode(), flags, options.encode()), "mount")
    except OSError as error:
        os.close(fuse)
        raise FloeError(
            f"cannot mount the pack filesystem at {target}: {error.strerror}", hint="run `floe packfs` as root"
        ) from error
    device = mounttable.mounts_at(target)[-1].device
    return Descriptors(fuse, slots.create(device), device)


def mounted_device(run_dir: Path) -> tuple[int, int] | None:
    """The device number of the pack filesystem mounted now, or None."""
    found = mounttable.mounts_at(run_dir / MOUNTPOINT)
    return found[-1].device if found and found[-1].fstype == _FSTYPE else None


def is_held(run_dir: Path) -> bool:
    """Whether the mount has its connection still, in whoever's hands: then it answers, or lets who asks wait.

    A child asks, since whoever does may wait for ever.
    """
    child = os.fork()
    if child == 0:
        try:
            os.statvfs(run_dir / MOUNTPOINT)
        except OSError as error:
            os._exit(1 if error.errno in _GONE else 0)
        os._exit(0)
    pidfd = os.pidfd_open(child)
    try:
        if not process.ended(pidfd, _ASK_SECONDS):
            os.kill(child, signal.SIGKILL)
            return True
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.close(pidfd)


def unmount(run_dir: Path) -> bool:
    """Unmount the pack filesystem; False when packs are in use (open, or under a mounted tree)."""
    try:
        _check(_libc.umount2(bytes(run_dir / MOUNTPOINT), _UMOUNT_NOFOLLOW), "umount")
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.EINVAL:  # not a mountpoint: somebody else unmounted it
            raise
    return True


def detach(run_dir: Path) -> None:
    """Abort what is mounted at `<run_dir>/packs` and take it away though in use: its readers get errors."""
    for mount in mounttable.mounts_at(run_dir / MOUNTPOINT):
        if mount.fstype == _FSTYPE:
            abort(mount.device)
        _libc.umount2(bytes(run_dir / MOUNTPOINT), _MNT_DETACH | _UMOUNT_NOFOLLOW)


def abort(device: tuple[int, int]) -> None:
    """Abort a connection; without fusectl it ends when its last descriptor is closed."""
    connection = connection_dir(device)
    if connection is not None:
        (connection / "abort").write_text("1", encoding="ascii")


def connection_dir(device: tuple[int, int]) -> Path | None:
    """The connection's directory below /sys/fs/fuse/connections, or None; fusectl is mounted when it is not."""
    path = _CONNECTIONS / str(device[0] << 20 | device[1])
    if not path.is_dir() and not mounttable.mounts_at(_CONNECTIONS):
        _libc.mount(b"fusectl", bytes(_CONNECTIONS), b"fusectl", 0, None)
    return path if path.is_dir() else None


def take_from(pid: int, device: tuple[int, int]) -> Descriptors | None:
    """Copies of the descriptors that process `pid` holds for the mount `device`; None when it holds none.

    Of a killed process that hangs in the kernel they are taken through the thread that hangs, from Linux 6.9 on.
    UnsupportedError when they are another version's.
    """
    held = _take(pid, Path(f"/proc/{pid}/fd"), device, 0)
    if held is None and process.is_doomed(pid):
        for thread in _threads(pid):
            held = held or _take(thread, Path(f"/proc/{pid}/task/{thread}/fd"), device, _PIDFD_THREAD)
    return held


def _threads(pid: int) -> list[int]:
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _take(task: int, folder: Path, device: tuple[int, int], flags: int) -> Descriptors | None:
    try:
        pidfd = os.pidfd_open(task, flags)
    except OSError:
        return None
    taken: dict[str, int] = {}
    try:
        for entry in folder.iterdir():
            target = str(entry.readlink())
            kind = FUSE_NAME if target == "/dev/fuse" else SLOTS_NAME if slots.MEMFD_NAME in target else ""
            if kind and kind not in taken:
                taken[kind] = _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(entry.name), 0), "pidfd_getfd")
    except OSError:
        pass  # it died meanwhile: what is taken so far decides
    finally:
        os.close(pidfd)
    return from_named(taken, device)


def from_named(fds: dict[str, int], device: tuple[int, int] | None) -> Descriptors | None:
    """Descriptors out of `fds` by name, when both are there and belong to the mount; else all are closed.

    UnsupportedError when they are another version's.
    """
    fuse, slot_fd = fds.get(FUSE_NAME, -1), fds.get(SLOTS_NAME, -1)
    kept: Descriptors | None = None
    try:
        if fuse >= 0 and slot_fd >= 0 and device is not None and slots.device_of(slot_fd) == device:
            kept = Descriptors(fuse, slot_fd, device)
    finally:
        for fd in fds.values():
            if kept is None or fd not in (fuse, slot_fd):
                os.close(fd)
    return kept


def store_in_systemd(descriptors: Descriptors) -> None:
    """Hand both to systemd's descriptor store (FileDescriptorStoreMax= at least 2), where it has one."""
    sd_notify(f"FDSTORE=1\nFDNAME={FUSE_NAME}", [descriptors.fuse])
    sd_notify(f"FDSTORE=1\nFDNAME={SLOTS_NAME}", [descriptors.slots])


def drop_from_systemd() -> None:
    """Take both out of systemd's store."""
    sd_notify(f"FDSTOREREMOVE=1\nFDNAME={FUSE_NAME}")
    sd_notify(f"FDSTOREREMOVE=1\nFDNAME={SLOTS_NAME}")
