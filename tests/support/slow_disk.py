"""A disk that is slow: ext4 on a loop device, over a file that a FUSE process serves. Each read waits, and bytes have a rate.

Run as a script it is that process: `slow_disk.py FOLDER MOUNTPOINT` serves FOLDER/image, and waits as FOLDER/speed says.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
_NAME = b"disk"


@contextlib.contextmanager
def ext4_disk(folder: Path, size: int = 96 * MIB) -> Iterator[Path]:
    """A file system of its own at `folder`/disk, on a loop device."""
    image, place = folder / "image", folder / "disk"
    place.mkdir(parents=True)
    _make(image, size)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


class SlowDisk:
    """`path` is where the file system is mounted."""

    def __init__(self, folder: Path, size: int = 96 * MIB) -> None:
        self._folder, self._served, self.path = folder, folder / "served", folder / "disk"
        for place in (self._served, self.path):
            place.mkdir(parents=True)
        _make(folder / "image", size)
        self.set(0.0)
        self._process = subprocess.Popen([sys.executable, __file__, folder, self._served])
        until = time.monotonic() + 20
        while not (self._served / _NAME.decode()).exists():
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        subprocess.run(["mount", "-o", "loop", self._served / _NAME.decode(), self.path], check=True)

    def set(self, delay: float, rate: float = 0.0) -> None:
        """From now on each read waits `delay` seconds, beside others, and `rate` bytes a second come in all; 0: as fast as can be."""
        (self._folder / "speed.new").write_text(f"{delay} {rate}")
        (self._folder / "speed.new").rename(self._folder / "speed")

    def close(self) -> None:
        """Take it away."""
        self.set(0.0)
        subprocess.run(["umount", "-l", self.path], check=False)
        subprocess.run(["umount", "-l", self._served], check=False)
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def slow_disk(folder: Path, size: int = 96 * MIB) -> Iterator[SlowDisk]:
    """One for the length of a with block."""
    made = SlowDisk(folder, size)
    try:
        yield made
    finally:
        made.close()


def device_of(place: Path) -> Path:
    """The loop device that is mounted there."""
    found = subprocess.run(["findmnt", "-n", "-o", "SOURCE", place], check=True, capture_output=True, text=True)
    return Path(found.stdout.strip())


def drop_page_cache(folder: Path) -> None:
    """Have the files below `folder` written, and read from the disk again next time."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _make(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", image], check=True)


def _serve(folder: Path, mountpoint: str) -> None:
    import pyfuse3  # noqa: PLC0415 - only here
    import trio  # noqa: PLC0415 - likewise

    image = os.open(folder / "image", os.O_RDWR)
    size = os.fstat(image).st_size
    file_node = pyfuse3.ROOT_INODE + 1

    line = trio.Lock()

    class OneFile(pyfuse3.Operations):
        async def getattr(self, inode: int, _context: Any = None) -> Any:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = 0o40700 if inode == pyfuse3.ROOT_INODE else 0o100600
            entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else size
            return entry

        async def lookup(self, _parent: int, name: bytes, _context: Any = None) -> Any:
            if name != _NAME:
                raise pyfuse3.FUSEError(2)
            return await self.getattr(file_node)

        async def setattr(self, inode: int, *_: Any) -> Any:
            return await self.getattr(inode)

        async def open(self, inode: int, *_: Any) -> Any:
            return pyfuse3.FileInfo(fh=inode, direct_io=True)  # else what was read once would be fast

        async def read(self, _fh: int, offset: int, length: int) -> bytes:
            delay, rate = map(float, (folder / "speed").read_text().split())
            await trio.sleep(delay)
            if rate:
                async with line:
                    await trio.sleep(length / rate)
            return os.pread(image, length, offset)

        async def write(self, _fh: int, offset: int, data: bytes) -> int:
            return os.pwrite(image, data, offset)

        async def fsync(self, *_: Any) -> None:
            pass

        async def flush(self, *_: Any) -> None:
            pass

        async def release(self, *_: Any) -> None:
            pass

    pyfuse3.init(OneFile(), mountpoint, {*pyfuse3.default_options, "fsname=test-slow-disk"})
    trio.run(pyfuse3.main)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
