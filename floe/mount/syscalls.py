"""The mount syscalls Python has no names for, by ctypes. Linux 5.12 and later, on x86-64, arm64 and riscv64.

Sources: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), open_tree(2), mount_setattr(2), include/uapi/linux/mount.h.
mount(2) is not used: it takes its options in one page, which some forty `device=` options fill.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _OPEN_TREE_CLONE = 1, 1, 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_MOVE_FROM_EMPTY_PATH = 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_MS_PRIVATE = 1 << 18
_STRING_MAX = 255  # bytes of a value fsconfig takes
_LOG_LINE = 1024  # bytes; the kernel cuts longer ones

_CLONE_NEWUSER = 0x10000000

RDONLY, NOSUID, NODEV = 1, 2, 4  # MOUNT_ATTR_*, for fsmount and mount_setattr
IDMAP = 0x100000  # for mount_setattr alone

_GETFSSYSFSPATH = 2 << 30 | 129 << 16 | 0x15 << 8 | 1  # FS_IOC_GETFSSYSFSPATH, include/uapi/linux/fs.h, Linux 6.9
_MOUNT_ATTR = struct.Struct("<QQQQ")  # attributes to set, to clear, propagation, user namespace

_libc = ctypes.CDLL(None, use_errno=True)


class MountSyscallError(OSError):
    """A mount syscall failed: `step` names it and its argument, `log` holds the kernel's own words, if any."""

    def __init__(self, code: int, step: str, log: list[str]) -> None:
        super().__init__(code, os.strerror(code))
        self.step = step
        self.log = log


def _call(step: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise MountSyscallError(ctypes.get_errno(), step, [])
    return result


class FsContext:
    """A superblock being configured (fsopen); `close` when done. Paths may be longer than fsconfig's 255 bytes."""

    def __init__(self, fstype: str) -> None:
        self._fd = _call(f"fsopen {fstype}", _FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)
        self._paths: list[int] = []

    def close(self) -> None:
        """Drop the context; a mount made from it stays."""
        for fd in (self._fd, *self._paths):
            os.close(fd)

    def flag(self, key: str) -> None:
        """Set a flag; EINVAL when the file system does not know it."""
        self._config(f"option {key}", _SET_FLAG, key.encode(), None)

    def path(self, key: str, value: str) -> None:
        """Set an option that names a file."""
        raw = os.fsencode(value)
        if len(raw) > _STRING_MAX:
            try:
                fd = os.open(raw, os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                raise MountSyscallError(error.errno or errno.EIO, f"open {value}", []) from error
            self._paths.append(fd)
            raw = f"/proc/self/fd/{fd}".encode()
        self._config(f"{key} {value}", _SET_STRING, key.encode(), raw)

    def create(self) -> None:
        """Make the superblock: devices are opened and the image is checked here."""
        self._config("create superblock", _CREATE, None, None)

    def mount(self, attributes: int) -> int:
        """A descriptor of the new mount, attached nowhere; closing it unmounts."""
        try:
            return _call("fsmount", _FSMOUNT, self._fd, _FSMOUNT_CLOEXEC, attributes)
        except MountSyscallError as error:
            error.log = self._log()
            raise

    def _config(self, step: str, command: int, key: bytes | None, value: bytes | None) -> None:
        try:
            _call(step, _FSCONFIG, self._fd, command, key, value, 0)
        except MountSyscallError as error:
            error.log = self._log()
            raise

    def _log(self) -> list[str]:
        lines = []
        while True:
            try:
                lines.append(os.read(self._fd, _LOG_LINE).decode("utf-8", "replace").strip())
            except OSError:  # ENODATA: nothing more to read
                return lines


def attach(mount_fd: int, target: str) -> None:
    """Attach a detached mount at `target`."""
    step = f"move_mount to {target}"
    _call(step, _MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_FROM_EMPTY_PATH)


@contextmanager
def cloned(source: str) -> Iterator[int]:
    """A descriptor of a new bind of `source`, attached nowhere yet."""
    fd = _call(f"open_tree {source}", _OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def set_attributes(mount_fd: int, attributes: int = 0, *, private: bool = False, userns: int = 0) -> None:
    """Add MOUNT_ATTR_* to one mount (not to its superblock), and make it private.

    `userns` is the descriptor of the user namespace that MOUNT_ATTR_IDMAP maps by.
    """
    packed = _MOUNT_ATTR.pack(attributes, 0, _MS_PRIVATE if private else 0, userns)
    _call("mount_setattr", _MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, packed, len(packed))


def new_user_namespace() -> None:
    """Move this process, which must have one thread, into a user namespace of its own."""
    if _libc.unshare(_CLONE_NEWUSER):
        raise MountSyscallError(ctypes.get_errno(), "unshare a user namespace", [])


def unmount(target: str, *, detach: bool = False) -> None:
    """umount2: EBUSY while in use, unless `detach` leaves that to the last user."""
    if _libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)):
        raise MountSyscallError(ctypes.get_errno(), f"umount {target}", [])


def sysfs_name(fd: int) -> str | None:
    """`erofs/erofs-7`: what sysfs calls the file system of an open directory; None before Linux 6.9."""
    answer = bytearray(129)
    try:
        fcntl.ioctl(fd, _GETFSSYSFSPATH, answer)
    except OSError:
        return None
    return answer[1 : 1 + answer[0]].decode("ascii", "replace")
