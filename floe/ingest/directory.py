"""A directory on disk as a model's tree: what is kept, what is followed, what is refused.

- Regular files and directories keep their permission bits, widened so that everybody can read them (files 0444,
  directories 0555); set-id and sticky bits go. They belong to root: a model looks the same whoever pushed it.
- Times are kept, with a nanosecond that is never zero: containerd compares the content of files whose nanosecond is.
- Of extended attributes only `user.*` is kept. Names of one inode inside the directory stay hard links.
- A symlink that stays inside the directory is kept as it is; one to a directory inside that is absolute, or passes
  through the outside, is made relative. One that leads outside (Hugging Face's cache links
  `snapshots/<sha>/x` to `../../blobs/<hash>`) is replaced by the regular file it leads to. Dangling ones, ones that
  lead to a directory outside, sockets, fifos and devices are refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from floe.ingest.chunker import INODE_BYTES, Identity, changed, identity, os_failure, shown
from floe.ingest.entries import FileContent, Node, mtime_parts
from floe.ingest.publish import Ingest
from floe.store.errors import BadInputError, NotFoundError

_XATTR_PREFIX = "user."
_SPECIAL = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a fifo",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(slots=True)
class _Found:
    """A file to read (or a directory that was listed), as it was when it was found."""

    path: bytes
    identity: Identity
    node: Node
    shared: bool = False  # the same inode may be found under another name too


@dataclass
class DirectoryScan:
    """A directory's tree without content; `total` counts the bytes to read, each inode once."""

    root: Node
    total: int = 0
    _files: list[_Found] = field(default_factory=list)
    _directories: list[_Found] = field(default_factory=list)

    def read_into(self, ingest: Ingest) -> None:
        """Read all files. SourceChangedError when one is not what it was when found."""
        contents: dict[bytes, FileContent] = {}
        for found in self._files:
            inode = found.identity[:INODE_BYTES]
            content = contents.get(inode) or ingest.add_file(found.path, found.identity)
            found.node.content = content
            if found.shared:
                contents[inode] = content

    def check_unchanged(self) -> None:
        """SourceChangedError when a file or directory is no longer what it was: the tree would mix two states."""
        for found in (*self._files, *self._directories):
            if identity(_lstat(found.path)) != found.identity:
                raise changed(found.path)


def scan_directory(
    directory: Path, *, only: Collection[bytes] | None = None, mtime: int | None = None, plain_modes: bool = False
) -> DirectoryScan:
    """Find what `directory` holds, reading no content.

    `only`: nothing but these files and symlinks, relative to it, and the directories that they are in. `mtime`: the time, in
    seconds, that everything is said to have. `plain_modes`: modes are those of `plain_mode`.
    NotFoundError: no such directory. BadInputError: not a directory, no regular file in it, or an entry that a model
    cannot hold. AccessDeniedError names what may not be read.
    """
    top = os.fsencode(directory)
    try:
        top = os.path.realpath(top, strict=True)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no directory {shown(top)}", hint="check the path") from error
    except OSError as error:
        raise os_failure(error, top) from error
    found = _lstat(top)
    if not stat.S_ISDIR(found.st_mode):
        raise BadInputError(f"{shown(top)} is not a directory", hint="a model is a directory: give the one it is in")
    scanner = _Scanner(top, only)
    scanner.run(found)
    for node in scanner.nodes:
        if mtime is not None:
            node.mtime, node.mtime_ns = mtime, 1
        if plain_modes:
            node.mode = plain_mode(node.mode)
    if not scanner.any_file:
        raise BadInputError(f"{shown(top)} holds no file: there is no model to push", hint="check the path")
    return scanner.scan


def plain_mode(mode: int) -> int:
    """A mode as the common umask of 022 makes it, whatever umask it was made with: files 0644, what its owner may run and directories 0755."""
    if stat.S_ISLNK(mode):
        return mode
    runs = stat.S_ISDIR(mode) or mode & stat.S_IXUSR
    return stat.S_IFMT(mode) | (0o755 if runs else 0o644)


class _Scanner:
    def __init__(self, top: bytes, only: Collection[bytes] | None = None) -> None:
        self._top = top
        self._only = None if only is None else frozenset(_with_parents(only))
        self._inodes: dict[bytes, Node] = {}  # of files with several names
        self._counted: set[bytes] = set()
        self.any_file = False
        self.nodes: list[Node] = []
        self.scan = DirectoryScan(Node(stat.S_IFDIR))

    def run(self, top: os.stat_result) -> None:
        self.scan.root = _directory_node(self._top, top)
        self.nodes.append(self.scan.root)
        pending = [(b"", self.scan.root, top)]
        while pending:
            relative, node, found = pending.pop()
            path = self._full(relative)
            self.scan._directories.append(_Found(path, identity(found), node))  # noqa: SLF001 - its maker
            below = []
            for name in _names(path):
                inner = relative + b"/" + name if relative else name
                if self._only is not None and inner not in self._only:
                    continue
                child_found = _lstat(self._full(inner))
                child = self._node(inner, child_found)
                node.children[name] = child
                self.nodes.append(child)
                if child.is_dir:
                    below.append((inner, child, child_found))
            # Content lies in packs in the order in which a walk of the tree comes to it, which is then a sequential read.
            pending.extend(reversed(below))

    def _full(self, relative: bytes) -> bytes:
        return self._top + b"/" + relative if relative else self._top

    def _node(self, relative: bytes, found: os.stat_result) -> Node:
        path, kind = self._full(relative), stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFDIR:
            return _directory_node(path, found)
        if kind == stat.S_IFLNK:
            return self._symlink(relative, found)
        if kind != stat.S_IFREG:
            raise BadInputError(
                f"{shown(path)} is {_SPECIAL.get(kind, 'no file')}: a model holds files, directories and symlinks",
                hint="remove it, or push a directory without it",
            )
        inode = identity(found)[:INODE_BYTES]
        node = self._inodes.get(inode)
        if node is None:
            node = self._file(path, found, shared=found.st_nlink > 1)
            if found.st_nlink > 1:
                self._inodes[inode] = node
        return node

    def _file(self, path: bytes, found: os.stat_result, *, shared: bool) -> Node:
        self.any_file = True
        node = _node(path, found, stat.S_IFREG | stat.S_IMODE(found.st_mode) & 0o777 | 0o444)
        known = identity(found)
        self.scan._files.append(_Found(path, known, node, shared))  # noqa: SLF001 - its maker
        if known[:INODE_BYTES] not in self._counted:
            self.scan.total += found.st_size
        if shared:
            self._counted.add(known[:INODE_BYTES])
        return node

    def _symlink(self, relative: bytes, found: os.stat_result) -> Node:
        path = self._full(relative)
        try:
            link = os.readlink(path)  # noqa: PTH115 - raw bytes
            real = os.path.realpath(path, strict=True)
            target = os.stat(real)  # noqa: PTH116 - raw bytes
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise os_failure(error, path) from error
            raise BadInputError(
                f"{shown(path)} is a symlink that leads nowhere", hint="remove it, or restore what it links to"
            ) from error
        lexical = os.path.normpath(os.path.join(os.path.dirname(relative), link))  # noqa: PTH118, PTH120 - raw bytes
        if self._inside(real):
            if not link.startswith(b"/") and lexical.split(b"/")[0] != b"..":
                return _symlink_node(link, found)
            if stat.S_ISDIR(target.st_mode):
                return _symlink_node(os.path.relpath(real, os.path.dirname(path)), found)  # noqa: PTH120 - raw bytes
        if stat.S_ISREG(target.st_mode):
            return self._file(real, target, shared=True)
        raise BadInputError(
            f"{shown(path)} is a symlink to {shown(real)}, outside of the directory and not a regular file",
            hint="copy what it links to into the directory",
        )

    def _inside(self, real: bytes) -> bool:
        return real == self._top or real.startswith(self._top.rstrip(b"/") + b"/")


def _with_parents(paths: Iterable[bytes]) -> Iterator[bytes]:
    for path in paths:
        parts = path.split(b"/")
        yield from (b"/".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _symlink_node(link: bytes, found: os.stat_result) -> Node:
    seconds, nanoseconds = _times(found)
    return Node(stat.S_IFLNK | 0o777, mtime=seconds, mtime_ns=nanoseconds, link=link)


def _directory_node(path: bytes, found: os.stat_result) -> Node:
    return _node(path, found, stat.S_IFDIR | stat.S_IMODE(found.st_mode) & 0o777 | 0o555)


def _node(path: bytes, found: os.stat_result, mode: int) -> Node:
    seconds, nanoseconds = _times(found)
    return Node(mode, mtime=seconds, mtime_ns=nanoseconds, xattrs=_xattrs(path))


def _times(found: os.stat_result) -> tuple[int, int]:
    seconds, nanoseconds = mtime_parts(found.st_mtime_ns)
    return seconds, nanoseconds or 1


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = [name for name in os.listxattr(path) if name.startswith(_XATTR_PREFIX)]
        return {os.fsencode(name): os.getxattr(path, name) for name in names}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return {}
        if error.errno == errno.ENODATA:
            raise changed(path) from error
        raise os_failure(error, path) from error


def _lstat(path: bytes) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        raise os_failure(error, path) from error


def _names(path: bytes) -> list[bytes]:
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - raw bytes, perhaps a hundred thousand of them
    except OSError as error:
        raise os_failure(error, path) from error
