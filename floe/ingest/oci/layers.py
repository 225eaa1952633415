"""A layer's tar stream to a tree of nodes, by the rules containerd applies a layer over others with.

Whiteouts take the form overlayfs knows: `.wh.name` is a character device 0/0, `.wh..wh..opq` the xattr
`trusted.overlay.opaque` on its directory. A later entry replaces an earlier one of its name; two directories merge.
The archive's entry for `/` is passed over, as containerd passes over it. What containerd would unpack outside of the
layer (absolute names, `..`) is refused.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from floe.ingest.oci import acl, tarheader
from floe.ingest.oci.links import LINKS_MAX, Steps, follow
from floe.ingest.oci.tarheader import Entry
from floe.ingest.oci.tarstream import Content, Limited, Sparse, TarStream
from floe.store.erofs import LINK_MAX, NAME_MAX, XATTR_VALUE_MAX, xattr_name_parts
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.nodes import CHUNK, INODES_MAX, Chunk, FileContent, Node, chunk_bits

WHITEOUT_PREFIX, AUFS_PREFIX, OPAQUE_MARKER = b".wh.", b".wh..wh.", b".wh..wh..opq"
PLINK_DIR = b".wh..wh.plnk"
OPAQUE_XATTR, OPAQUE_VALUE = b"trusted.overlay.opaque", b"y"
_CAPABILITY = b"security.capability"
_ID_MAX = 0xFFFFFFFE
# What a small blob may unpack to in memory, or in work: an archive of headers alone shrinks to a thousandth.
PATH_MAX = 4095  # bytes of a name: the longest that an unpacker can make
CONTENT_MAX = 16 << 40  # bytes of all files, holes included: the largest file of ext4
METADATA_MAX = 512 << 20  # bytes of all names, link targets and extended attributes
_XATTR_COST = 150  # bytes of memory that an extended attribute takes beside its own
_XATTRS_FREE = 4  # of an inode: no more than what INODES_MAX allows for
_WARNINGS_MAX = 100
_DEVICES = {tarheader.CHAR: stat.S_IFCHR, tarheader.BLOCK_DEVICE: stat.S_IFBLK, tarheader.FIFO: stat.S_IFIFO}


class ContentSink(Protocol):
    """Where file contents go, in the order of the stream."""

    def add_stream(self, readable: Content, size: int) -> FileContent:
        """Store `size` bytes of `readable`."""
        ...


class HotContentSink(Protocol):
    """Where contents go that are wanted side by side."""

    def add_hot(self, path: bytes, readable: Content, size: int) -> FileContent | None:
        """Store the content of the file at `path`, relative to the root; None, and nothing is read: it is not wanted so."""
        ...


@dataclass
class LayerTree:
    """A layer's `root`; `implicit` are directories (path, node) that have no entry of their own in the archive.

    `end`: where the archive's entries end, in bytes of the tar.
    """

    root: Node
    implicit: list[tuple[bytes, Node]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    end: int = 0


def xattrs_cost(xattrs: Mapping[bytes, bytes]) -> int:
    """Bytes that an inode's extended attributes count for in METADATA_MAX: many short ones take much more than they are."""
    if not xattrs:  # nearly always
        return 0
    own = sum(len(name) + len(value) for name, value in xattrs.items())
    return own + _XATTR_COST * max(0, len(xattrs) - _XATTRS_FREE)


def is_whiteout(node: Node) -> bool:
    """Whether overlayfs takes `node` for a deleted name."""
    return stat.S_ISCHR(node.mode) and node.rdev == 0


def read_layer(
    pieces: Iterator[bytes],
    sink: ContentSink,
    what: str,
    hot: HotContentSink | None = None,
    seen: Callable[[int, Entry], None] | None = None,
) -> LayerTree:
    """Read a whole tar stream; contents go to `hot`, which may not want them, or `sink`. `what` names the layer in errors.

    `seen` is told where each entry begins (a byte of the tar), and of the entry; not of the end.

    DamagedError: not a layer, or an absolute name or one with `..` in it. UnsupportedError: an entry that cannot
    be kept as it is.
    """
    builder = _Builder(sink, what, hot)
    stream = TarStream(pieces, what)
    for entry in stream:
        if seen is not None:
            seen(stream.start, entry)
        builder.add(entry, stream)
    tree = builder.tree()
    tree.end = stream.start
    return tree


class _Builder:
    def __init__(self, sink: ContentSink, what: str, hot: HotContentSink | None = None) -> None:
        self._sink = sink
        self._hot = hot
        self._what = what
        self._root = Node(stat.S_IFDIR | 0o755)
        self._implicit: dict[int, tuple[bytes, Node]] = {}
        self._plinks: dict[bytes, Node] = {}  # aufs's hidden names of files, which hard links may refer to
        self._warnings: list[str] = []
        self._last: tuple[bytes, Node] | None = None  # the parent found last, by the name it was asked for
        self._inodes = self._metadata = self._size = 0  # so far, of what was replaced too
        self._steps = Steps(what)

    def tree(self) -> LayerTree:
        implicit = [(path, node) for path, node in self._implicit.values() if self._find(path) is node]
        return LayerTree(self._root, implicit, self._warnings)

    def add(self, entry: Entry, stream: TarStream) -> None:
        self._count(len(entry.name) + len(entry.link) + xattrs_cost(entry.xattrs))
        parts = self._parts(entry.name, entry)
        if not parts:
            self._root.mtime, self._root.mtime_ns = entry.mtime, entry.mtime_ns
            return
        base = parts[-1]
        # Looked for in the whole name first, since nearly none has it.
        if AUFS_PREFIX in entry.name and base != OPAQUE_MARKER and any(p.startswith(AUFS_PREFIX) for p in parts):
            self._bookkeeping(parts, entry, stream)
            return
        self._check(entry)
        parent = self._parent(parts[:-1], entry)
        if base == OPAQUE_MARKER:
            parent.xattrs[OPAQUE_XATTR] = OPAQUE_VALUE
        elif base.startswith(WHITEOUT_PREFIX):
            self._whiteout(parent, base[len(WHITEOUT_PREFIX) :], entry)
        elif entry.type == tarheader.DIRECTORY:
            self._directory(parent, base, entry)
        elif entry.type == tarheader.LINK:
            self._hard_link(parent, base, entry)
        else:
            self._remove(parent, base)
            parent.children[base] = self._leaf(entry, stream)

    def _count(self, metadata: int) -> None:
        """One more inode with so many bytes of names and attributes."""
        self._inodes += 1
        self._metadata += metadata
        if self._inodes > INODES_MAX or self._metadata > METADATA_MAX:
            raise UnsupportedError(
                f"{self._what} has more than {INODES_MAX} entries or {METADATA_MAX >> 20} MiB of names and attributes",
                hint="split it over several layers",
            )

    def _bookkeeping(self, parts: list[bytes], entry: Entry, stream: TarStream) -> None:
        """Aufs's own files are not part of the layer, but for those that names in it are hard links to."""
        if parts[0] == PLINK_DIR and entry.type == tarheader.REG:
            self._check(entry)
            self._plinks[b"/".join(parts)] = self._leaf(entry, stream)

    def _leaf(self, entry: Entry, stream: TarStream) -> Node:
        node = Node(0, entry.uid, entry.gid, entry.mtime, entry.mtime_ns)
        if entry.type == tarheader.REG:
            node.mode = stat.S_IFREG | entry.mode
            if entry.size:
                node.content = self._content(stream, entry)
        elif entry.type == tarheader.SYMLINK:
            if not entry.link:
                raise DamagedError(f"{self._name(entry)} is a symlink to nothing")
            if len(entry.link) > LINK_MAX:
                raise UnsupportedError(f"{self._name(entry)} is a symlink to a name of {len(entry.link)} bytes")
            node.mode, node.link = stat.S_IFLNK | 0o777, entry.link
        elif entry.type in _DEVICES:
            node.mode = _DEVICES[entry.type] | entry.mode
            if entry.type != tarheader.FIFO:
                node.rdev = self._device(entry)
        else:
            raise UnsupportedError(f"{self._name(entry)} is of the unknown type {entry.type!r}")
        self._xattrs(node, entry)
        return node

    def _content(self, stream: TarStream, entry: Entry) -> FileContent:
        content, size = stream.content(), entry.size
        self._size += size
        if self._size > CONTENT_MAX:
            raise UnsupportedError(f"{self._what} holds files of {self._size} bytes; at most {CONTENT_MAX} are kept")
        if isinstance(content, Sparse) and size > CHUNK:
            return _sparse_content(self._sink, content, size)
        if self._hot is not None:
            path = b"/".join(self._parts(entry.name, entry))
            if (stored := self._hot.add_hot(path, content, size)) is not None:
                return stored
        return self._sink.add_stream(content, size)

    def _directory(self, parent: Node, base: bytes, entry: Entry) -> None:
        node = parent.children.get(base)
        if node is None or not node.is_dir:
            hidden = node is not None and is_whiteout(node)
            self._remove(parent, base)
            node = parent.children[base] = Node(stat.S_IFDIR)
            if hidden:
                # Deleted below and made anew: what was below must not shine through.
                node.xattrs[OPAQUE_XATTR] = OPAQUE_VALUE
        node.mode = stat.S_IFDIR | entry.mode
        node.uid, node.gid, node.mtime, node.mtime_ns = entry.uid, entry.gid, entry.mtime, entry.mtime_ns
        self._xattrs(node, entry)
        self._implicit.pop(id(node), None)

    def _whiteout(self, parent: Node, name: bytes, entry: Entry) -> None:
        if name in (b"", b".", b".."):
            raise DamagedError(f"{self._name(entry)} is a whiteout of no name")
        node = parent.children.get(name)
        if node is None:
            parent.children[name] = Node(stat.S_IFCHR, entry.uid, entry.gid, entry.mtime, entry.mtime_ns)
        elif node.is_dir:
            node.xattrs[OPAQUE_XATTR] = OPAQUE_VALUE

    def _hard_link(self, parent: Node, base: bytes, entry: Entry) -> None:
        self._remove(parent, base)
        # Some builders write targets as absolute names; they cannot lead out of the layer.
        parts = self._parts(entry.link.lstrip(b"/"), entry)
        target = self._target(parts)
        if target is None:
            raise UnsupportedError(
                f"{self._name(entry)} is a hard link to {_show(entry.link)}, which this layer does not hold before it",
                hint="containerd cannot unpack this layer over others either: build the image again",
            )
        if target.is_dir:
            raise DamagedError(f"{self._name(entry)} is a hard link to a directory")
        parent.children[base] = target
        # An unpacker gives the entry's owner, mode and times to the file all names share; chown drops capabilities.
        target.uid, target.gid, target.mtime, target.mtime_ns = entry.uid, entry.gid, entry.mtime, entry.mtime_ns
        if not stat.S_ISLNK(target.mode):
            target.mode = stat.S_IFMT(target.mode) | entry.mode
        target.xattrs.pop(_CAPABILITY, None)
        self._xattrs(target, entry)

    def _xattrs(self, node: Node, entry: Entry) -> None:
        if not entry.xattrs and not node.xattrs:  # nearly always
            return
        for name, value in entry.xattrs.items():
            if self._keeps(node, name, entry):
                if len(value) > XATTR_VALUE_MAX or len(name) > NAME_MAX:
                    raise UnsupportedError(f"{self._name(entry)} has an xattr {_show(name)} of {len(value)} bytes")
                node.xattrs[name] = value
        access = node.xattrs.get(acl.ACCESS)
        if access is not None:
            try:
                fitting = acl.fit(access, node.mode)
            except ValueError as error:
                raise DamagedError(f"{self._name(entry)} has an access ACL that cannot be read") from error
            if fitting is None:
                del node.xattrs[acl.ACCESS]
            else:
                node.xattrs[acl.ACCESS] = fitting
        default = node.xattrs.get(acl.DEFAULT)
        if default is not None and acl.parse(default) is None:
            raise DamagedError(f"{self._name(entry)} has a default ACL that cannot be read")

    def _keeps(self, node: Node, name: bytes, entry: Entry) -> bool:
        """Whether an unpacker would set this xattr; otherwise it is left out, with a warning.

        `trusted.` belongs to the administrator, and to overlayfs: containerd takes none from archives.
        """
        fits = xattr_name_parts(name) is not None and not name.startswith(b"trusted.")
        if name.startswith(b"user."):
            fits = fits and (node.is_file or node.is_dir)
        elif name == acl.ACCESS:
            fits = not stat.S_ISLNK(node.mode)
        elif name == acl.DEFAULT:
            fits = node.is_dir
        if not fits:
            self._warn(f"{self._name(entry)}: xattr {_show(name)} is left out: such a file cannot take it from a layer")
        return fits

    def _device(self, entry: Entry) -> int:
        if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
            raise UnsupportedError(f"{self._name(entry)} is device {entry.major}, {entry.minor}: out of range")
        return os.makedev(entry.major, entry.minor)

    def _check(self, entry: Entry) -> None:
        if not (0 <= entry.uid <= _ID_MAX and 0 <= entry.gid <= _ID_MAX):
            raise DamagedError(f"{self._name(entry)} has the owner {entry.uid}:{entry.gid}: out of range")

    def _parts(self, name: bytes, entry: Entry) -> list[bytes]:
        if len(name) > PATH_MAX:
            raise UnsupportedError(
                f"{self._what} has an entry with a name of {len(name)} bytes; at most {PATH_MAX} fit"
            )
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if name.startswith(b"/"):
            raise DamagedError(f"{self._name(entry)} has an absolute name")
        if b".." in parts:
            raise DamagedError(f"{self._name(entry)} has '..' in {_show(name)}")
        if len(name) > NAME_MAX and any(len(part) > NAME_MAX for part in parts):
            raise DamagedError(f"{self._name(entry)} has a name of more than {NAME_MAX} bytes")
        return parts

    def _remove(self, parent: Node, base: bytes) -> None:
        if parent.children.pop(base, None) is not None:
            self._last = None

    def _parent(self, parts: list[bytes], entry: Entry) -> Node:
        """The directory at `parts`, following this layer's own symlinks and making what is missing."""
        name = b"/".join(parts)
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        nodes, path = [self._root], list[bytes]()
        links = 0
        pending = deque(parts)
        while pending:
            part = pending.popleft()
            if part in (b"", b"."):
                continue
            if part == b"..":  # out of a symlink; `/..` is `/`
                del nodes[max(1, len(nodes) - 1) :], path[max(0, len(path) - 1) :]
                continue
            child = nodes[-1].children.get(part)
            if child is not None and stat.S_ISLNK(child.mode):
                links += 1
                if links > LINKS_MAX:
                    raise DamagedError(f"{self._name(entry)} lies behind too many symlinks")
                if child.link.startswith(b"/"):
                    del nodes[1:], path[:]
                pending.extendleft(self._steps.through(child.link))
                continue
            path.append(part)
            if child is None or is_whiteout(child):
                child = self._implied(nodes[-1], part, b"/".join(path), opaque=child is not None)
            elif not child.is_dir:
                raise DamagedError(f"{self._name(entry)} lies below {_show(b'/'.join(path))}, which is no directory")
            nodes.append(child)
        self._last = (name, nodes[-1])
        return nodes[-1]

    def _implied(self, parent: Node, base: bytes, path: bytes, *, opaque: bool) -> Node:
        if len(base) > NAME_MAX:
            raise DamagedError(f"{self._what} has a symlink through a name of more than {NAME_MAX} bytes")
        if len(path) > PATH_MAX:  # symlinks may lead further than any name
            raise UnsupportedError(
                f"{self._what} has symlinks that lead to a directory with a name of {len(path)} bytes; at most {PATH_MAX} fit",
                hint="containerd cannot unpack this layer either: build the image again",
            )
        self._count(len(path))  # all of it is kept
        node = parent.children[base] = Node(stat.S_IFDIR | 0o755)
        if opaque:
            node.xattrs[OPAQUE_XATTR] = OPAQUE_VALUE
        else:
            self._implicit[id(node)] = (path, node)
        return node

    def _target(self, parts: list[bytes]) -> Node | None:
        """What a hard link names: its directory through symlinks, itself as it is."""
        if parts[:1] == [PLINK_DIR]:
            return self._plinks.get(b"/".join(parts))
        node, left = follow(self._root, parts, self._steps, last=False)
        return None if left else node

    def _find(self, path: bytes) -> Node | None:
        node: Node | None = self._root
        for part in path.split(b"/"):
            node = node.children.get(part) if node is not None else None
        return node

    def _name(self, entry: Entry) -> str:
        return f"entry {_show(entry.name)} of {self._what}"

    def _warn(self, text: str) -> None:
        if len(self._warnings) < _WARNINGS_MAX:
            self._warnings.append(text)


def _show(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))


def _sparse_content(sink: ContentSink, content: Sparse, size: int) -> FileContent:
    """A large sparse file, chunk by chunk, so that chunks within holes cost nothing."""
    chunks: list[Chunk | None] = []
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        if content.hole() >= length:
            content.skip(length)
            chunks.append(None)
        else:
            chunks.extend(sink.add_stream(Limited(content, length), length).chunks)
    return FileContent(size, chunk_bits(size), tuple(chunks))
