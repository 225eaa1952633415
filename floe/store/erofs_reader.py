"""EROFS image to node tree: everything is checked before it is believed, for images come over the network.

Reads what Floe writes (see erofs.py). DamagedError: the bytes contradict themselves or the format; UnsupportedError:
valid EROFS, perhaps, but features that Floe's trees do not use.
"""

from __future__ import annotations

import stat

from floe.store.erofs_check import check_image
from floe.store.erofs_inodes import Inode, Inodes
from floe.store.ids import Buffer
from floe.store.nodes import Chunk, FileContent, Node, blocks
from floe.store.packindex import BLOCK


def read_image(image: Buffer, what: str = "tree image") -> Node:
    """The root of the tree in `image`; `what` names it in errors.

    Chunks come without digests; those of a large file end where the file ends. Raises DamagedError, UnsupportedError.
    """
    check_image(
        image, what
    )  # bounds what is made of it: inodes that claim the same bytes would each become a node of their own
    return _Reader(image, what).run()


class _Reader:
    def __init__(self, image: Buffer, what: str) -> None:
        self._image = Inodes(image, what)
        self._nodes: dict[int, tuple[Inode, Node]] = {}
        self._names: dict[int, int] = {}  # nid -> names found, of what is no directory

    def run(self) -> Node:
        """Every inode that the root leads to."""
        image = self._image
        root, root_node = self._read(image.superblock.root_nid)
        if not root_node.is_dir:
            raise image.damaged("the root is not a directory")
        pending = [(root, root_node, root)]
        while pending:
            directory, node, parent = pending.pop()
            links = 2
            for name, nid, kind in self._entries(directory, parent):
                known = nid in self._nodes
                child, child_node = self._nodes[nid] if known else self._read(nid)
                if stat.S_IFMT(child.mode) != kind:
                    raise image.damaged(f"{name!r} is of another type than its directory says")
                node.children[name] = child_node
                if child_node.is_dir:
                    if known:
                        raise image.damaged(f"directory {name!r} is found at two places")
                    links += 1
                    pending.append((child, child_node, directory))
                else:
                    self._names[nid] = self._names.get(nid, 0) + 1
            if links != directory.links:
                raise image.damaged(f"a directory with {links - 2} subdirectories has {directory.links} links")
        for nid, found in self._names.items():
            if self._nodes[nid][0].links != found:
                raise image.damaged(f"inode {nid} has {found} names but {self._nodes[nid][0].links} links")
        if len(self._nodes) != image.superblock.inodes:
            raise image.damaged(f"{len(self._nodes)} inodes were found, {image.superblock.inodes} announced")
        return root_node

    def _read(self, nid: int) -> tuple[Inode, Node]:
        inode = self._image.inode(nid)
        xattrs = self._image.xattrs(inode)
        node = Node(inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_ns, inode.rdev, xattrs=xattrs)
        if stat.S_ISREG(inode.mode):
            node.content = self._content(inode)
        elif stat.S_ISLNK(inode.mode):
            node.link = self._image.link(inode)
        self._nodes[nid] = inode, node
        return inode, node

    def _content(self, inode: Inode) -> FileContent | None:
        if not inode.size:
            return None
        bits = self._image.chunk_bits(inode)
        chunks = tuple(
            None if found.pack is None else Chunk(b"", found.length, found.pack, found.offset // BLOCK)
            for found in self._image.chunks(inode, 0, -(-inode.size >> bits))
        )
        return FileContent(inode.size, bits, chunks)

    def _entries(self, directory: Inode, parent: Inode) -> list[tuple[bytes, int, int]]:
        """(name, nid, type of file) of all entries but `.` and `..`, which are checked."""
        entries: list[tuple[bytes, int, int]] = []
        dots: dict[bytes, tuple[int, int]] = {}
        last = b""
        for number in range(blocks(directory.size)):
            for name, nid, kind, _ in self._image.block_entries(directory, number):
                if name <= last:
                    raise self._image.damaged(f"directory {directory.nid} is not sorted at {name!r}")
                last = name
                if name in (b".", b".."):
                    dots[name] = (nid, kind)
                else:
                    entries.append((name, nid, kind))
        if dots != {b".": (directory.nid, stat.S_IFDIR), b"..": (parent.nid, stat.S_IFDIR)}:
            raise self._image.damaged(f"directory {directory.nid} does not name itself and its parent")
        return entries
