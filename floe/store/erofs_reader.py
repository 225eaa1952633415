"""EROFS image to node tree: everything is checked before it is believed, for images come over the network.

Reads what Floe writes (see erofs.py). DamagedError: the bytes contradict themselves or the format; UnsupportedError:
valid EROFS, perhaps, but features that Floe's trees do not use.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from floe.store import erofs
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import Buffer
from floe.store.nodes import Chunk, FileContent, Node, blocks, chunk_bits
from floe.store.packindex import BLOCK

_KIND_BY_TYPE = {number: kind for kind, number in erofs.FILE_TYPES.items()}


@dataclass(slots=True)
class _Inode:
    """An inode's fields. `data` is the offset in bytes of what follows inode and xattrs."""

    node: Node
    nid: int
    layout: int
    size: int
    union: int
    links: int
    data: int


def read_image(image: Buffer, what: str = "tree image") -> Node:
    """The root of the tree in `image`; `what` names it in errors.

    Chunks come without digests; those of a large file end where the file ends. Raises DamagedError, UnsupportedError.
    """
    return _Reader(memoryview(image), what).run()


class _Reader:
    def __init__(self, image: memoryview, what: str) -> None:
        self._image = image
        self._what = what
        self._superblock = erofs.parse_superblock(image, len(image), what)
        self._packs = erofs.read_device_table(image, what)
        self._inodes: dict[int, _Inode] = {}
        self._names: dict[int, int] = {}  # nid -> names found, of what is no directory

    def run(self) -> Node:
        """Every inode that the root leads to."""
        root = self._inode(self._superblock.root_nid)
        if not root.node.is_dir:
            raise self._damaged("the root is not a directory")
        pending = [(root, root)]
        while pending:
            directory, parent = pending.pop()
            links = 2
            for name, nid, kind in self._entries(directory, parent):
                known = self._inodes.get(nid)
                child = known or self._inode(nid)
                if stat.S_IFMT(child.node.mode) != kind:
                    raise self._damaged(f"{name!r} is of another type than its directory says")
                directory.node.children[name] = child.node
                if child.node.is_dir:
                    if known is not None:
                        raise self._damaged(f"directory {name!r} is found at two places")
                    links += 1
                    pending.append((child, directory))
                else:
                    self._names[nid] = self._names.get(nid, 0) + 1
            if links != directory.links:
                raise self._damaged(f"a directory with {links - 2} subdirectories has {directory.links} links")
        for nid, found in self._names.items():
            if self._inodes[nid].links != found:
                raise self._damaged(f"inode {nid} has {found} names but {self._inodes[nid].links} links")
        if len(self._inodes) != self._superblock.inodes:
            raise self._damaged(f"{len(self._inodes)} inodes were found, {self._superblock.inodes} announced")
        return root.node

    def _damaged(self, detail: str) -> DamagedError:
        return DamagedError(f"{self._what} is damaged: {detail}", hint="push its model or index its image again")

    def _bytes(self, offset: int, length: int) -> memoryview:
        if length < 0 or offset + length > len(self._image):
            raise self._damaged(f"{length} bytes at {offset} lie outside of the image")
        return self._image[offset : offset + length]

    def _inode(self, nid: int) -> _Inode:
        offset = nid * erofs.SLOT
        head = self._bytes(offset, erofs.INODE.size)
        form, count, mode, _, size, union, _, uid, gid, mtime, mtime_ns, links = erofs.INODE.unpack(head)
        layout = form >> 1
        if not form & erofs.EXTENDED or layout not in (erofs.LAYOUT_PLAIN, erofs.LAYOUT_INLINE, erofs.LAYOUT_CHUNKED):
            raise UnsupportedError(f"{self._what} has an inode of format {form:#x}", hint="upgrade Floe on this node")
        kind = stat.S_IFMT(mode)
        if kind not in erofs.FILE_TYPES or mtime_ns >= 10**9 or not links:
            raise self._damaged(f"inode {nid} has mode {mode:#o}, {mtime_ns} ns, {links} links")
        length = erofs.XATTR_HEADER.size + 4 * (count - 1) if count else 0
        xattrs = self._xattrs(nid, self._bytes(offset + erofs.INODE.size, length))
        node = Node(mode, uid, gid, mtime, mtime_ns, xattrs=xattrs)
        inode = _Inode(node, nid, layout, size, union, links, offset + erofs.INODE.size + length)
        if kind == stat.S_IFREG:
            node.content = self._content(inode)
        elif kind == stat.S_IFLNK:
            if not 0 < size <= erofs.LINK_MAX:
                raise self._damaged(f"inode {nid} is a symlink to {size} bytes")
            node.link = bytes(self._data(inode))
            if b"\0" in node.link:
                raise self._damaged(f"inode {nid} is a symlink with a zero byte")
        elif kind != stat.S_IFDIR and (size or layout != erofs.LAYOUT_PLAIN):
            raise self._damaged(f"inode {nid} is special but holds {size} bytes")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            node.rdev = erofs.decode_device(union)
        self._inodes[nid] = inode
        return inode

    def _xattrs(self, nid: int, body: memoryview) -> dict[bytes, bytes]:
        if not body:
            return {}
        _, shared = erofs.XATTR_HEADER.unpack_from(body)
        if shared:
            raise UnsupportedError(f"{self._what} has shared extended attributes", hint="upgrade Floe on this node")
        found: dict[bytes, bytes] = {}
        position = erofs.XATTR_HEADER.size
        while position < len(body):
            name_length, prefix, value_length = erofs.XATTR_ENTRY.unpack_from(body, position)
            start = position + erofs.XATTR_ENTRY.size
            value_at = start + name_length
            position = value_at + value_length
            position += -position % 4
            if position > len(body):
                raise self._damaged(f"inode {nid} has extended attributes past their end")
            name = bytes(body[start:value_at])
            if prefix in erofs.XATTR_ACLS and not name:
                name = erofs.XATTR_ACLS[prefix]
            elif prefix in erofs.XATTR_PREFIXES and name and b"\0" not in name:
                name = erofs.XATTR_PREFIXES[prefix] + name
            else:
                raise self._damaged(f"inode {nid} has an extended attribute of unknown kind {prefix}")
            if name in found or len(name) > erofs.NAME_MAX:
                raise self._damaged(f"inode {nid} has extended attribute {name!r} twice, or its name is too long")
            found[name] = bytes(body[value_at : value_at + value_length])
        return found

    def _content(self, inode: _Inode) -> FileContent | None:
        size = inode.size
        if not size:
            return None
        if inode.layout != erofs.LAYOUT_CHUNKED:
            raise UnsupportedError(f"{self._what} has file data inside", hint="upgrade Floe on this node")
        bits = erofs.BLOCK_BITS + (inode.union & 0x1F)
        if inode.union & ~0x3F or not inode.union & erofs.CHUNK_INDEXES or bits != chunk_bits(size):
            raise self._damaged(f"inode {inode.nid} of {size} bytes has chunk format {inode.union:#x}")
        start = inode.data + -inode.data % erofs.CHUNK_INDEX.size
        count = -(-size >> bits)
        table = self._bytes(start, count * erofs.CHUNK_INDEX.size)
        chunks: list[Chunk | None] = []
        for number, (_, device, block) in enumerate(erofs.CHUNK_INDEX.iter_unpack(table)):
            length = min(1 << bits, size - (number << bits))
            chunks.append(None if block == erofs.HOLE else self._chunk(inode.nid, device, block, length))
        return FileContent(size, bits, tuple(chunks))

    def _chunk(self, nid: int, device: int, block: int, length: int) -> Chunk:
        if not 0 < device <= len(self._packs):
            raise self._damaged(f"inode {nid} has data in pack {device} of {len(self._packs)}")
        pack_id, size = self._packs[device - 1]
        if block + blocks(length) > size:
            raise self._damaged(f"inode {nid} has data past the end of pack {pack_id}")
        return Chunk(b"", length, pack_id, block)

    def _data(self, inode: _Inode) -> memoryview | bytes:
        """The bytes of a directory or symlink."""
        size = inode.size
        if inode.layout == erofs.LAYOUT_PLAIN:
            return self._bytes(inode.union * BLOCK, size)
        if inode.layout != erofs.LAYOUT_INLINE:
            raise self._damaged(f"inode {inode.nid} has layout {inode.layout}, which its type cannot have")
        full = (size - 1) // BLOCK * BLOCK if size else 0
        if inode.data % BLOCK + size - full > BLOCK:
            raise self._damaged(f"inode {inode.nid} has inline data across two blocks")
        tail = self._bytes(inode.data, size - full)
        return bytes(self._bytes(inode.union * BLOCK, full)) + bytes(tail) if full else tail

    def _entries(self, directory: _Inode, parent: _Inode) -> list[tuple[bytes, int, int]]:
        """(name, nid, type of file) of all entries but `.` and `..`, which are checked."""
        data = self._data(directory)
        entries: list[tuple[bytes, int, int]] = []
        dots: dict[bytes, tuple[int, int]] = {}
        last = b""
        for start in range(0, len(data), BLOCK):
            for name, nid, kind in self._block_entries(directory.nid, bytes(data[start : start + BLOCK])):
                if name <= last:
                    raise self._damaged(f"directory {directory.nid} is not sorted at {name!r}")
                last = name
                if name in (b".", b".."):
                    dots[name] = (nid, kind)
                else:
                    entries.append((name, nid, kind))
        if dots != {b".": (directory.nid, stat.S_IFDIR), b"..": (parent.nid, stat.S_IFDIR)}:
            raise self._damaged(f"directory {directory.nid} does not name itself and its parent")
        return entries

    def _block_entries(self, nid: int, block: bytes) -> list[tuple[bytes, int, int]]:
        size = erofs.DIRENT.size
        first = int.from_bytes(block[8:10], "little") if len(block) >= size else 0
        if not first or first % size or first > len(block):
            raise self._damaged(f"directory {nid} has a block that cannot be one")
        table = list(erofs.DIRENT.iter_unpack(block[:first]))
        ends = [*(offset for _, offset, _, _ in table[1:]), len(block)]
        found = []
        for (child, offset, file_type, _), end in zip(table, ends, strict=True):
            name = block[offset:end]
            if end == len(block):
                name = name.rstrip(b"\0")
            if offset < first or not 0 < len(name) <= erofs.NAME_MAX or b"/" in name or b"\0" in name:
                raise self._damaged(f"directory {nid} has {name!r} for a name")
            if file_type not in _KIND_BY_TYPE:
                raise self._damaged(f"directory {nid} has an entry of unknown type {file_type}")
            found.append((name, child, _KIND_BY_TYPE[file_type]))
        return found
