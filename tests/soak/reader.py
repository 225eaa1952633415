"""A process that reads a tree again and again, by every way there is to read, and compares each byte and each name.

    python -m soak.reader TREE.json ROOT SEED OUT

It goes on until its standard input ends. OUT gets a line of JSON at least once a second while reads come back: the figures
so far; and one for each problem: `wrong` (other bytes, names or attributes) or `failed` (an error).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from soak.content import KIB, MIB, Entry, Tree, link_counts, load

_LONGEST = MIB
_MOST_PROBLEMS = 5
_SEQUENTIAL = 8 * MIB  # bytes of one reading in order


class Reader:
    """`root` holds the tree. `say` gets each problem, as a dictionary with `kind`, `path` and `what`."""

    def __init__(self, tree: Tree, root: str, rng: random.Random, say: Callable[[dict[str, str]], None]) -> None:
        self._tree, self._root, self._random, self._say = tree, root, rng, say
        self._files = [path for path, entry in tree.items() if stat.S_ISREG(entry.mode)]
        self._large = [path for path in self._files if tree[path].size > 256 * KIB]
        self._links = link_counts(tree)
        self._ways = (self._pread, self._readv, self._mapped, self._in_order, self._sent)
        self.reads, self.bytes, self.walks, self.problems = 0, 0, 0, 0

    def step(self) -> None:
        """Read something of some file."""
        path = self._random.choice(self._large if self._large and self._random.random() < 0.7 else self._files)
        entry, way = self._tree[path], self._random.choice(self._ways)
        try:
            fd = os.open(os.path.join(self._root, path), os.O_RDONLY)  # noqa: PTH118 - names in any bytes
            try:
                if entry.size:
                    way(path, entry, fd)
                if self._random.random() < 0.4:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        except OSError as error:
            self._problem("failed", path, f"{way.__name__}: {error}")
        except ValueError as error:  # an empty file cannot be mapped
            self._problem("wrong", path, f"{way.__name__}: {error}")

    def walk(self) -> None:
        """Compare all names and attributes, and the content of small files."""
        self.walks += 1
        found: set[str] = set()
        pending, inodes = [""], {}
        try:
            while pending:
                here = pending.pop()
                for name in os.listdir(os.path.join(self._root, here)):  # noqa: PTH118, PTH208 - names in any bytes
                    path = f"{here}/{name}" if here else name
                    found.add(path)
                    self._compare(path, inodes)
                    if path in self._tree and stat.S_ISDIR(self._tree[path].mode):
                        pending.append(path)
        except OSError as error:
            self._problem("failed", self._root, f"walking: {error}")
            return
        for path in sorted(found ^ self._tree.keys()):
            self._problem("wrong", path, "it is not in the tree" if path in found else "it is missing")

    def _compare(self, path: str, inodes: dict[str, int]) -> None:
        expected = self._tree.get(path)
        if expected is None:
            return
        place = os.path.join(self._root, path)  # noqa: PTH118
        seen = os.lstat(place)
        xattrs = {
            name: os.getxattr(place, name, follow_symlinks=False).hex()
            for name in os.listxattr(place, follow_symlinks=False)
        }
        is_file, is_dir = stat.S_ISREG(seen.st_mode), stat.S_ISDIR(seen.st_mode)
        is_link = stat.S_ISLNK(seen.st_mode)
        got = Entry(
            seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns, seen.st_size if is_file else 0,
            link=os.readlink(place) if is_link else "",  # noqa: PTH115
            rdev=seen.st_rdev if stat.S_ISBLK(seen.st_mode) or stat.S_ISCHR(seen.st_mode) else 0, xattrs=xattrs,
        )  # fmt: skip
        want = Entry(
            expected.mode, expected.uid, expected.gid, expected.mtime_ns, expected.size,
            link=expected.link, rdev=expected.rdev, xattrs=expected.xattrs,
        )  # fmt: skip
        if got != want:
            self._problem("wrong", path, f"{got} where {want} was expected")
        links = self._links[expected.inode] if expected.inode else 1
        if not is_dir and seen.st_nlink != links:
            self._problem("wrong", path, f"{seen.st_nlink} links where {links} were expected")
        if expected.inode and inodes.setdefault(expected.inode, seen.st_ino) != seen.st_ino:
            self._problem("wrong", path, "it is another inode than the file that it is a link of")
        if is_file and 0 < expected.size <= 128 * KIB:
            fd = os.open(place, os.O_RDONLY)
            try:
                self._check(path, expected, 0, os.read(fd, 256 * KIB), expected.size)
            finally:
                os.close(fd)

    # ways to read

    def _span(self, entry: Entry) -> tuple[int, int]:
        start = self._random.randrange(entry.size)
        if self._random.random() < 0.3:
            start &= ~4095
        return start, self._random.randint(1, self._random.choice((100, 5000, 200_000, _LONGEST)))

    def _pread(self, path: str, entry: Entry, fd: int) -> None:
        start, length = self._span(entry)
        self._check(path, entry, start, os.pread(fd, length, start), length)

    def _readv(self, path: str, entry: Entry, fd: int) -> None:
        start, length = self._span(entry)
        buffers = [bytearray(size) for size in (1, 4095, length, 777)]
        count = os.preadv(fd, buffers, start)
        self._check(path, entry, start, b"".join(buffers)[:count], sum(map(len, buffers)))

    def _mapped(self, path: str, entry: Entry, fd: int) -> None:
        start, length = self._span(entry)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            self._check(path, entry, start, mapped[start : start + length], length)

    def _in_order(self, path: str, entry: Entry, fd: int) -> None:
        size, at = self._random.choice((4096, 60_000, MIB)), self._span(entry)[0]
        end = min(entry.size, at + _SEQUENTIAL)
        os.lseek(fd, at, os.SEEK_SET)
        while at < end:
            data = os.read(fd, size)
            self._check(path, entry, at, data, size)
            if not data:
                return
            at += len(data)

    def _sent(self, path: str, entry: Entry, fd: int) -> None:
        start, length = self._span(entry)
        memory = os.memfd_create("sent")
        try:
            sent = 0
            while sent < length and (count := os.sendfile(memory, fd, start + sent, length - sent)):
                sent += count
            self._check(path, entry, start, os.pread(memory, length, 0), length)
        finally:
            os.close(memory)

    def _check(self, path: str, entry: Entry, start: int, data: bytes, length: int) -> None:
        self.reads += 1
        self.bytes += len(data)
        expected = entry.content(start, length)
        if data == expected:
            return
        at = next(
            (n for n, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), min(len(data), len(expected))
        )
        what = f"{length} bytes at {start}: {len(data)} came, {len(expected)} expected, they differ from byte {at} on"
        self._problem(
            "wrong", path, f"{what}: {data[at : at + 16].hex()} where {expected[at : at + 16].hex()} was expected"
        )

    def _problem(self, kind: str, path: str, what: str) -> None:
        self.problems += 1
        if self.problems <= _MOST_PROBLEMS:  # a reader that goes on finds the same again
            self._say({"kind": kind, "path": os.path.join(self._root, path), "what": what})  # noqa: PTH118


def main(tree: str, root: str, seed: str, out: str) -> int:
    with Path(out).open("a", buffering=1) as output:

        def say(message: dict[str, object]) -> None:
            output.write(json.dumps(message) + "\n")

        reader = Reader(load(Path(tree)), root, random.Random(int(seed)), say)
        said = 0.0

        def figures() -> None:
            say({"reads": reader.reads, "bytes": reader.bytes, "walks": reader.walks})

        while not select.select([sys.stdin], [], [], 0)[0]:
            if reader.walks == 0 or random.random() < 0.01:
                reader.walk()
            reader.step()
            if time.monotonic() - said > 1:
                said = time.monotonic()
                figures()
        figures()
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(*sys.argv[1:]))
