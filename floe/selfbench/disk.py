"""The cache disk: written, read in order and read at random, past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from floe.selfbench.figures import Disk, percentile
from floe.store.cache.node_cache import disk_errors

_PIECE = 1 << 20  # bytes; what the cache writes is of this size and more
_THREADS = 4  # pieces at once, which any disk with a queue needs to show what it can
_READS = 2000  # random ones, at most
SMALL, FRAME = 4 << 10, 128 << 10


def measure(path: Path, size: int, seconds: float) -> Disk:
    """Write `path`, a new file of at most `size` bytes (whole MiB), and read it, `seconds` for each way; the file stays.

    NoSpaceError, DiskError.
    """
    with disk_errors(f"measuring the cache disk in {path}"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            return _measure(fd, path.parent, size, seconds)
        finally:
            os.close(fd)


def measure_nameless(folder: Path, size: int, seconds: float) -> Disk:
    """The same with a file in `folder` that has no name: whatever ends this process, nothing of it stays."""
    with disk_errors(f"measuring the cache disk in {folder}"), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return _measure(file.fileno(), folder, size, seconds)


def _measure(fd: int, folder: Path, size: int, seconds: float) -> Disk:
    """With an empty file of `folder`, open for both ways."""
    direct = _past_page_cache(fd)
    source = os.urandom(_PIECE)

    def write(buffer: mmap.mmap, offset: int) -> int:
        buffer[:] = source
        return os.pwrite(fd, buffer, offset)

    def read(buffer: mmap.mmap, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    begun = time.perf_counter()
    written = _in_order(write, size, seconds)
    os.fdatasync(fd)
    writing = time.perf_counter() - begun
    _drop(fd)
    begun = time.perf_counter()
    got = _in_order(read, written, seconds)
    reading = time.perf_counter() - begun
    waits = {}
    for length in (SMALL, FRAME):
        if not direct:
            _drop(fd)
        waits[length] = _at_random(fd, length, written, seconds)
    return Disk(
        path=str(folder),
        direct=direct,
        bytes=written,
        write_bytes_per_second=written / writing,
        read_bytes_per_second=got / reading,
        read_4kib_median_seconds=percentile(waits[SMALL], 0.5),
        read_4kib_p99_seconds=percentile(waits[SMALL], 0.99),
        read_128kib_median_seconds=percentile(waits[FRAME], 0.5),
        read_128kib_p99_seconds=percentile(waits[FRAME], 0.99),
    )


def drop_pages(path: Path) -> None:
    """Have the kernel forget the clean pages of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _drop(fd)
    finally:
        os.close(fd)


def _drop(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _past_page_cache(fd: int) -> bool:
    """Have reads and writes go past the page cache; False where the file system cannot."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _in_order(move: Callable[[mmap.mmap, int], int], size: int, seconds: float) -> int:
    """Move pieces of `size` bytes from the start, some at once, until `seconds` are over; the bytes moved, no gaps."""
    lock = threading.Lock()
    until = time.monotonic() + seconds
    next_piece = 0
    failed: list[OSError] = []

    def go_on() -> None:
        nonlocal next_piece
        with mmap.mmap(-1, _PIECE) as buffer:  # its address is a multiple of what O_DIRECT wants
            while True:
                with lock:
                    offset = next_piece
                    if failed or offset + _PIECE > size or (offset and time.monotonic() >= until):
                        return
                    next_piece += _PIECE
                try:
                    moved = move(buffer, offset)
                except OSError as error:
                    failed.append(error)
                    return
                if moved != _PIECE:
                    failed.append(OSError(errno.EIO, "less than asked for"))

    threads = [threading.Thread(target=go_on, name="floe-bench-disk") for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        failed.append(OSError(errno.EINTR, "interrupted"))
        for thread in threads:
            thread.join()
        raise
    if failed:
        raise failed[0]
    return next_piece


def _at_random(fd: int, length: int, size: int, seconds: float) -> list[float]:
    """Seconds of reads of `length` bytes, one after another."""
    waits: list[float] = []
    until = time.monotonic() + seconds
    with mmap.mmap(-1, length) as buffer:
        while len(waits) < _READS and (not waits or time.monotonic() < until):
            offset = random.randrange(size // length) * length
            begun = time.perf_counter()
            os.preadv(fd, [buffer], offset)
            waits.append(time.perf_counter() - begun)
    return waits
