"""What is timed. Each returns seconds; each starts with the files' pages out of the page cache.

The `cold` ones drop everything from the machine's page, dentry and inode caches, so that metadata and data come from
the disk, as at a container's first start; the others leave metadata and the file behind the mount (the image, the node
cache's packs) in memory, so that the way through the file systems is what is measured.
"""

import functools
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BUFFER = 1 << 20


def _files(folder: Path) -> Iterator[Path]:
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in names)


def _read(path: Path, buffer: bytearray) -> int:
    total = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def _forget(path: Path) -> None:
    # Per file: dropping the whole machine's cache is bimodal where the hypervisor takes free pages back.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def empty_page_cache() -> None:
    """Drop the machine's page, dentry and inode caches."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_large(folder: Path, *, cold: bool = False) -> float:
    """Read the large file from start to end, 1 MiB at a time."""
    path, buffer = folder / "large.bin", bytearray(BUFFER)
    _forget(path)
    if cold:
        empty_page_cache()
    start = time.perf_counter()
    _read(path, buffer)
    return time.perf_counter() - start


def map_large(folder: Path) -> float:
    """Copy the large file out of a mapping of it, 1 MiB at a time: every page is a fault, as with safetensors."""
    path, buffer = folder / "large.bin", bytearray(BUFFER)
    _forget(path)
    start = time.perf_counter()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        memoryview(mapped) as view,
    ):
        for offset in range(0, len(view), BUFFER):
            with view[offset : offset + BUFFER] as piece:  # released, else the mapping cannot be closed
                buffer[: len(piece)] = piece
    return time.perf_counter() - start


def read_small(folder: Path, *, cold: bool = False) -> float:
    """Walk the tree of small files and read every one."""
    buffer = bytearray(BUFFER)
    for path in _files(folder / "small"):
        _forget(path)
    if cold:
        empty_page_cache()
    start = time.perf_counter()
    for path in _files(folder / "small"):
        _read(path, buffer)
    return time.perf_counter() - start


def find(folder: Path) -> float:
    """`find -ls` over the small files, with no dentry, inode or metadata block cached."""
    empty_page_cache()
    start = time.perf_counter()
    subprocess.run(["find", str(folder / "small"), "-ls"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


LARGE, SMALL, MAPPED = "read large", "read small", "map large"
WORKLOADS: dict[str, Callable[[Path], float]] = {
    LARGE: read_large,
    MAPPED: map_large,
    SMALL: read_small,
    f"{LARGE}, cold": functools.partial(read_large, cold=True),
    f"{SMALL}, cold": functools.partial(read_small, cold=True),
    "find, cold": find,
}
# First reads on a node that holds nothing, from the bucket; each begins with an empty page cache. Otherwise who runs just after
# a subject that freed much memory is faster than who runs when the hypervisor has taken it back.
FIRST_READS: dict[str, Callable[[Path], float]] = {f"first {LARGE}": read_large, f"first {SMALL}": read_small}
