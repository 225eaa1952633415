"""Files that survive a crash whole or not at all, and holes that give disk space back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from floe.store.ids import Buffer

_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01  # linux/falloc.h
_IOV_MAX = 1000  # the kernel's limit is 1024
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(target: Path, data: Buffer, spare: Path) -> None:
    """Create or replace `target`, readable by its owner only; `spare` is a folder on the same disk for the temporary."""
    with _temporary(spare) as (fd, name):
        write_all(fd, data, 0)
        os.fsync(fd)
        name.rename(target)
    sync_folder(target.parent)


def create_sparse(target: Path, size: int, spare: Path) -> None:
    """Make `target` a file of `size` bytes that takes no space; nothing happens when it exists already."""
    with _temporary(spare) as (fd, name):
        os.ftruncate(fd, size)
        with contextlib.suppress(FileExistsError):
            target.hardlink_to(name)  # unlike a rename, never replaces what another process put there first


@contextlib.contextmanager
def _temporary(spare: Path) -> Iterator[tuple[int, Path]]:
    fd, text = tempfile.mkstemp(dir=spare)
    name = Path(text)
    try:
        yield fd, name
    finally:
        os.close(fd)
        name.unlink(missing_ok=True)


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`; OSError as it comes."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def write_pieces(fd: int, pieces: Sequence[Buffer], offset: int) -> int:
    """Write all of `pieces`, one after another, from `offset` on; the bytes written. OSError as it comes."""
    views = [memoryview(piece).cast("B") for piece in pieces]
    begin = offset
    while views:
        written = os.pwritev(fd, views[:_IOV_MAX], offset)
        offset += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]
    return offset - begin


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return libc


def punch(fd: int, offset: int, length: int) -> bool:
    """Give back the space of [offset, offset + length); False when the file system cannot. OSError otherwise."""
    while _libc().fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def begin_write_back(fd: int, offset: int, length: int) -> None:
    """Have what is dirty of [offset, offset + length) written to the disk from now on; no promise, so no error."""
    _libc().sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def current_boot_id() -> str:
    """The kernel's id of this boot, a uuid: what the page cache held is lost when it changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
