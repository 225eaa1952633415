"""What a running container sees of its image, looked at from the host through /proc/PID/root."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from floe.store import mounttable

Fact = tuple[object, ...]
_READERS = 8


class ContainerTree:
    """The root file system of process `pid`, without what the runtime mounted over it."""

    def __init__(self, pid: int) -> None:
        self._root = b"/proc/%d/root" % pid
        mounts = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        self._covered = {os.fsencode(mount.target) for mount in mounttable.parse(mounts)}

    def _paths(self) -> Iterator[tuple[bytes, os.stat_result]]:
        pending = [b""]
        while pending:
            here = pending.pop()
            with os.scandir(self._root + here + b"/") as entries:
                for entry in entries:
                    path = here + b"/" + entry.name
                    if path in self._covered:
                        continue
                    found = entry.stat(follow_symlinks=False)
                    yield path, found
                    if stat.S_ISDIR(found.st_mode):
                        pending.append(path)

    def facts(self) -> dict[bytes, Fact]:
        """Path -> all that lstat, readlink and listxattr tell, but for a directory's size and the root itself.

        Of a file with several names the last fact is the first of them, so that links to other files show.
        """
        facts: dict[bytes, Fact] = {}
        linked: dict[tuple[int, int], list[bytes]] = {}
        for path, found in self._paths():
            mode, where = found.st_mode, self._root + path
            xattrs = {
                name: os.getxattr(where, name, follow_symlinks=False)
                for name in sorted(os.listxattr(where, follow_symlinks=False))
            }
            facts[path] = (
                mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_nlink,
                found.st_rdev if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else 0,
                os.readlink(where) if stat.S_ISLNK(mode) else b"",  # noqa: PTH115 - Path would normalize it
                found.st_size if stat.S_ISREG(mode) else 0, tuple(xattrs.items()),
            )  # fmt: skip
            if found.st_nlink > 1 and not stat.S_ISDIR(mode):
                linked.setdefault((found.st_dev, found.st_ino), []).append(path)
        for names in linked.values():
            for path in names:
                facts[path] += (min(names),)
        return facts

    def contents(self) -> dict[bytes, bytes]:
        """Path of a regular file -> blake3 of what reading it gives."""
        files = [path for path, found in self._paths() if stat.S_ISREG(found.st_mode)]
        with ThreadPoolExecutor(_READERS) as readers:
            return dict(zip(files, readers.map(self._sum, files), strict=True))

    def _sum(self, path: bytes) -> bytes:
        hasher = blake3()
        with open(self._root + path, "rb", buffering=0) as file:  # noqa: PTH123 - a name in bytes
            while piece := file.read(1 << 20):
                hasher.update(piece)
        return hasher.digest()


def differences(found: dict[bytes, Fact], expected: dict[bytes, Fact]) -> dict[bytes, tuple[object, object]]:
    """Path -> (found, expected) of the first twenty that are not alike; None stands for what is not there."""
    unlike = sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))
    return {path: (found.get(path), expected.get(path)) for path in unlike[:20]}
