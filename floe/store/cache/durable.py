"""Files that survive a crash whole or not at all, and holes that give disk space back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from floe.store.ids import Buffer

_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01  # linux/falloc.h
PAGE = os.sysconf("SC_PAGE_SIZE")
SPARE = "tmp"  # the folder of a cache directory for temporaries
_YOUNG = 10.0  # seconds; a temporary so young may not be locked yet
_IOV_MAX = 1000  # the kernel's limit is 1024
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_CACHESTAT = 451  # asm-generic/unistd.h, since Linux 6.5


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
        fcntl.flock(fd, fcntl.LOCK_EX)  # as long as its writer lives
        yield fd, name
    finally:
        os.close(fd)
        name.unlink(missing_ok=True)


def remove_dead(spare: Path) -> int:
    """Remove temporaries whose writers were killed; how many there were. OSError when the folder cannot be read."""
    removed = 0
    with os.scandir(spare) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.is_file(follow_symlinks=False) or time.time() - entry.stat().st_mtime < _YOUNG:
                    continue
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(entry.path).unlink()
                    removed += 1
                finally:
                    os.close(fd)
    return removed


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


def is_in_memory(fd: int, offset: int, length: int) -> bool | None:
    """Whether all of [offset, offset + length) is in the page cache; None where the kernel does not tell."""
    asked = (ctypes.c_uint64 * 2)(offset, length)
    told = (ctypes.c_uint64 * 5)()  # pages that are there, dirty, under write-back, evicted, recently evicted
    if _libc().syscall(_CACHESTAT, fd, asked, told, 0):
        return None
    first, last = offset // PAGE, (offset + length - 1) // PAGE
    return bool(told[0] > last - first)


def current_boot_id() -> str:
    """The kernel's id of this boot, a uuid: what the page cache held is lost when it changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
