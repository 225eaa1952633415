"""Read-only loop devices, for kernels that cannot mount EROFS straight from files. Source: loop(4), linux/loop.h."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_CONFIGURE, _CLR_FD, _GET_FREE = 0x4C0A, 0x4C01, 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_LOOP_MAJOR = 7
_ATTEMPTS = 64  # another program may take the device we were told is free
# struct loop_config: file descriptor, block size, then loop_info64: device, inode, rdevice, offset, size limit,
# number, encryption type and key size, flags, file name, cipher name, key, two words; then eight reserved words
_CONFIG = struct.Struct("<II QQQQQIIII64s64s32sQQ 8Q")
_BLOCK = 4096


@dataclass(frozen=True)
class LoopDevice:
    """An attached loop device. The kernel detaches it when `fd` is closed and no mount uses it (autoclear)."""

    path: str
    fd: int


def attach_loop(backing: str, *, direct_io: bool = False) -> LoopDevice:
    """A new read-only loop device on the file `backing`; raises OSError."""
    file = os.open(backing, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            device = _free_device()
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _configure(fd, file, direct_io=direct_io):
                    return LoopDevice(device, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    finally:
        os.close(file)
    raise OSError(errno.EBUSY, "every free loop device was taken by another program", backing)


def _free_device() -> str:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(control, _GET_FREE)
    finally:
        os.close(control)
    device = f"/dev/loop{number}"
    if not Path(device).exists():  # a /dev that is not the kernel's own, as in many containers
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    return device


def _configure(fd: int, file: int, *, direct_io: bool) -> bool:
    """False when the device was taken meanwhile. Direct I/O is left out where the backing file cannot do it."""
    flags = _READ_ONLY | _AUTOCLEAR | (_DIRECT_IO if direct_io else 0)
    config = _CONFIG.pack(file, _BLOCK, 0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0, *[0] * 8)
    try:
        fcntl.ioctl(fd, _CONFIGURE, config)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if direct_io and error.errno == errno.EINVAL:
            return _configure(fd, file, direct_io=False)
        raise
    return True


def backing_file(device: str) -> str | None:
    """The file behind `/dev/loopN`; None when the device is detached."""
    try:
        text = Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text("utf-8", "surrogateescape")
    except OSError:
        return None
    return text.rstrip("\n").removesuffix(" (deleted)")


def attached_loops() -> dict[str, str]:
    """Every attached loop device of this machine: `/dev/loopN` -> its backing file."""
    found = {}
    for entry in Path("/sys/block").glob("loop*"):
        device = f"/dev/{entry.name}"
        backing = backing_file(device)
        if backing is not None:
            found[device] = backing
    return found


def detach_loop(device: str) -> None:
    """Detach; a device still in use is detached when its last user closes it. OSError when it is attached no more."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _CLR_FD)
    finally:
        os.close(fd)
