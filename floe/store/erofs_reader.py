"""EROFS image to node tree: all of it is checked first (erofs_check.py), for images come over the network.

Reads what Floe writes (see erofs.py). DamagedError: the bytes contradict themselves or the format; UnsupportedError:
valid EROFS, perhaps, but features that Floe's trees do not use.
"""

from __future__ import annotations

import stat

from floe.store.erofs_check import check_image
from floe.store.erofs_inodes import Inode, Inodes
from floe.store.ids import Buffer
from floe.store.nodes import Chunk, FileContent, Node
from floe.store.packindex import BLOCK


def read_image(image: Buffer, what: str = "tree image") -> Node:
    """The root of the tree in `image`; `what` names it in errors.

    Chunks come without digests; those of a large file end where the file ends. Raises DamagedError, UnsupportedError.
    """
    # This bounds what is made of it, too: inodes that share their bytes would each become a node of their own.
    check_image(image, what)
    return _Reader(image, what).run()


class _Reader:
    """Of an image that was checked as a whole: what its inodes and directories say agrees."""

    def __init__(self, image: Buffer, what: str) -> None:
        self._image = Inodes(image, what)
        self._nodes: dict[int, Node] = {}  # by nid

    def run(self) -> Node:
        """Every inode that the root leads to."""
        root = self._image.inode(self._image.superblock.root_nid)
        pending = [(root, self._read(root))]
        while pending:
            directory, node = pending.pop()
            for name, nid, kind, _ in self._image.entries(directory):
                if name in (b".", b".."):
                    continue
                child = self._nodes.get(nid)
                if child is None:
                    inode = self._image.inode(nid)
                    child = self._read(inode)
                    if kind == stat.S_IFDIR:
                        pending.append((inode, child))
                node.children[name] = child
        return self._nodes[root.nid]

    def _read(self, inode: Inode) -> Node:
        xattrs = self._image.xattrs(inode)
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_ns, inode.rdev, xattrs=xattrs)
        if stat.S_ISREG(inode.mode):
            node.content = self._content(inode)
        elif stat.S_ISLNK(inode.mode):
            node.link = self._image.link(inode)
        self._nodes[inode.nid] = node
        return node

    def _content(self, inode: Inode) -> FileContent | None:
        if not inode.size:
            return None
        bits = self._image.chunk_bits(inode)
        chunks = tuple(
            None if found.pack is None else Chunk(b"", found.length, found.pack, found.offset // BLOCK)
            for found in self._image.chunks(inode, 0, -(-inode.size >> bits))
        )
        return FileContent(inode.size, bits, chunks)
