"""A file tree in memory: what a tree object holds, and what every source of content is turned into.

A hard link is one `Node` under several names. Link counts are not kept: a directory's is two and its
subdirectories, anything else's is the number of its names (see `link_counts`).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from floe.store.packindex import BLOCK, MAX_CHUNK

CHUNK = MAX_CHUNK  # bytes; the grid of large files, and the largest file that is one chunk
CHUNK_BITS = 22
MIN_CHUNK_BITS = 12
INODES_MAX = 1 << 21  # of a tree; an indexer takes some KiB of memory for each


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of file content: `length` bytes from the first byte of `block` (4 KiB) of pack `pack_id`.

    While its pack is being written, `pack_id` is empty and `block` counts from the start of the pack's section;
    the pack writer fills in both when it seals the pack. `digest` (blake3, 32 bytes) is empty for a chunk that was
    read from an image, which does not record it.
    """

    digest: bytes
    length: int
    pack_id: str = ""
    block: int = 0


@dataclass(frozen=True, slots=True)
class FileContent:
    """A regular file's bytes: `chunks` on a grid of 2**`chunkbits` bytes; None is a hole. `size` is in bytes."""

    size: int
    chunkbits: int
    chunks: tuple[Chunk | None, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One inode. `mode` holds the file type too; `rdev` is os.makedev's number.

    `mtime` is in whole seconds since 1970 (negative before), `mtime_ns` the nanoseconds after it, 0 to 999,999,999.
    `link` is a symlink's target. `children` maps raw-byte names to nodes. `content` is None for an empty file too.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    link: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    content: FileContent | None = None

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def size(self) -> int:
        """Bytes of a regular file or of a symlink's target, else 0."""
        if self.content is not None:
            return self.content.size
        return len(self.link)


def chunk_bits(size: int) -> int:
    """log2 of the chunk size of a file of `size` bytes: the whole file up to 4 MiB, else the 4 MiB grid."""
    return min(CHUNK_BITS, max(MIN_CHUNK_BITS, (size - 1).bit_length()))


def blocks(length: int) -> int:
    """4 KiB blocks that `length` bytes take."""
    return -(-length // BLOCK)


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Every (path, node) below and with `root` (path b""), parents first, names in byte order; hard links repeat."""
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        prefix = path + b"/" if path else b""
        stack.extend((prefix + name, node.children[name]) for name in sorted(node.children, reverse=True))


def link_counts(root: Node) -> dict[int, int]:
    """id(node) -> the link count stat shows, for every node of the tree."""
    counts: dict[int, int] = {}
    for _, node in walk(root):
        if node.is_dir:
            counts[id(node)] = 2 + sum(child.is_dir for child in node.children.values())
        else:
            counts[id(node)] = counts.get(id(node), 0) + 1
    return counts


def find(root: Node, path: bytes) -> Node | None:
    """The node at `path` (slash-separated, relative to `root`), not following symlinks; None when absent."""
    node: Node | None = root
    for name in path.split(b"/"):
        if not name or node is None:
            continue
        node = node.children.get(name)
    return node
