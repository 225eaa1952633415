"""Paths in a model's tree. Pure: answers from the tree's EROFS image.

A path is relative to the model's root, with `/` between names; `""` is the root. Names that are not UTF-8 appear as
`os.fsdecode` has them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from floe.store.erofs_inodes import Inode, Inodes
from floe.store.errors import BadInputError, NotFoundError

_LINKS_MAX = 40  # symlinks that one path may pass, as the kernel's
FILE, DIRECTORY, SYMLINK = "file", "directory", "symlink"
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK}


@dataclass(frozen=True)
class Entry:
    """What is at `path`: its `kind` (FILE, DIRECTORY, SYMLINK), permission bits, `size` in bytes (0 of a directory).

    `mtime_ns`: nanoseconds since the epoch; `link`: a symlink's target; `inode`: equal for names of one file.
    """

    path: str
    kind: str
    size: int
    mode: int
    mtime_ns: int
    inode: int
    link: str | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


class TreePaths:
    """Looks paths up in `image`; `what` names the model in errors. Thread-safe."""

    def __init__(self, image: Inodes, what: str) -> None:
        self.image = image
        self._what = what
        self._root = image.superblock.root_nid

    def find(self, path: str, *, follow: bool = True) -> Entry:
        """The entry at `path`; with `follow` the one that a symlink there leads to. NotFoundError; BadInputError: leads out."""
        parts, nid = self._walk(path, follow=follow)
        return self._entry(b"/".join(parts), nid)

    def inode(self, entry: Entry) -> Inode:
        """The inode of an entry, for `Inodes`."""
        return self.image.inode(entry.inode)

    def ls(self, path: str = "") -> list[Entry]:
        """What is in the directory `path`, in order of the names. NotFoundError when it is no directory."""
        parts, nid = self._walk(path, follow=True)
        directory = self.image.inode(nid)
        if not stat.S_ISDIR(directory.mode):
            raise NotFoundError(f"{path!r} in {self._what} is not a directory")
        prefix = b"".join(part + b"/" for part in parts)
        return [
            self._entry(prefix + entry.name, entry.nid)
            for entry in self.image.entries(directory)
            if entry.name not in (b".", b"..")
        ]

    def walk(self) -> Iterator[Entry]:
        """Everything below the root, a directory before what is in it, symlinks as they are."""
        pending, seen = [""], set[int]()
        while pending:
            for entry in self.ls(pending.pop()):
                yield entry
                if entry.kind == DIRECTORY:
                    if entry.inode in seen:
                        raise self.image.damaged(f"directory {entry.inode} has two places")
                    seen.add(entry.inode)
                    pending.append(entry.path)

    def _walk(self, path: str, *, follow: bool) -> tuple[list[bytes], int]:
        """The names on the way to what `path` leads to, symlinks resolved, and its inode number."""
        pending = _parts(os.fsencode(path))[::-1]
        done: list[tuple[bytes, int]] = []
        links = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                if not done:
                    raise BadInputError(f"{path!r} leads out of {self._what}")
                done.pop()
                continue
            directory = self.image.inode(done[-1][1] if done else self._root)
            nid = self.image.lookup(directory, name) if stat.S_ISDIR(directory.mode) else None
            if nid is None:
                raise NotFoundError(f"there is no {path!r} in {self._what}")
            inode = self.image.inode(nid)
            if stat.S_ISLNK(inode.mode) and (follow or pending):
                links += 1
                target = self.image.link(inode)
                if links > _LINKS_MAX or target.startswith(b"/"):
                    raise BadInputError(f"{path!r} leads out of {self._what}, or in a circle")
                pending += _parts(target)[::-1]
                continue
            done.append((name, nid))
        return [name for name, _ in done], done[-1][1] if done else self._root

    def _entry(self, path: bytes, nid: int) -> Entry:
        inode = self.image.inode(nid)
        kind = _KINDS.get(stat.S_IFMT(inode.mode))
        if kind is None:
            raise self.image.damaged(f"inode {nid} is nothing that a model holds")
        link = os.fsdecode(self.image.link(inode)) if kind == SYMLINK else None
        return Entry(
            os.fsdecode(path),
            kind,
            0 if kind == DIRECTORY else inode.size,
            stat.S_IMODE(inode.mode),
            inode.mtime * 10**9 + inode.mtime_ns,
            nid,
            link,
        )


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]
