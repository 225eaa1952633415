"""Mount an EROFS image on files with the kernel itself, for tests of what is written."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
FSOPEN, FSCONFIG, FSMOUNT, MOVE_MOUNT = 430, 431, 432, 429
SET_FLAG, SET_STRING, CREATE = 0, 1, 6


def _call(number: int, *args: object) -> int:
    result: int = _libc.syscall(number, *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mount_erofs(image: Path, devices: Sequence[Path], target: Path) -> None:
    """Mount `image` read-only at `target` with its packs in device-table order; OSError when the kernel refuses."""
    context = _call(FSOPEN, b"erofs", 1)
    try:
        _call(FSCONFIG, context, SET_STRING, b"source", os.fsencode(image), 0)
        _call(FSCONFIG, context, SET_FLAG, b"ro", None, 0)
        for device in devices:
            _call(FSCONFIG, context, SET_STRING, b"device", os.fsencode(device), 0)
        _call(FSCONFIG, context, CREATE, None, None, 0)
        mount = _call(FSMOUNT, context, 1, 1)
        try:
            _call(MOVE_MOUNT, mount, b"", -100, os.fsencode(target), 4)
        finally:
            os.close(mount)
    finally:
        os.close(context)


@contextlib.contextmanager
def mounted(image: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
    """The same, unmounted at the end."""
    target.mkdir(exist_ok=True)
    mount_erofs(image, devices, target)
    try:
        yield target
    finally:
        if _libc.umount2(os.fsencode(target), 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(target))


def fsck(image: Path, devices: Sequence[Path]) -> None:
    """Have fsck.erofs read an image and all content in its packs; AssertionError with what it found."""
    options = [f"--device={device}" for device in devices]
    done = subprocess.run(["fsck.erofs", "--extract", *options, image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
