"""Inodes, directories and file maps of an EROFS image, read one at a time and checked before they are believed.

What erofs.py describes as structs; erofs_reader.py makes a whole tree of it, the portable mount answers single requests
from a mapped image. DamagedError: the bytes contradict themselves or the format; UnsupportedError: valid EROFS, perhaps,
but features that Floe's trees do not use.
"""

from __future__ import annotations

import stat
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from floe.store import erofs
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import Buffer
from floe.store.nodes import blocks, chunk_bits
from floe.store.packindex import BLOCK

_KIND_BY_TYPE = {number: kind for kind, number in erofs.FILE_TYPES.items()}


class Inode(NamedTuple):
    """An inode's fields, as stat shows them; `size` in bytes, a directory's too.

    `layout` and `union` are the format's; `data` is the offset in bytes of what follows inode and xattrs.
    """

    nid: int
    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    links: int
    size: int
    layout: int
    union: int
    data: int

    @property
    def rdev(self) -> int:
        """os.makedev's number of a device, else 0."""
        special = stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)
        return erofs.decode_device(self.union) if special else 0


class Extent(NamedTuple):
    """`length` bytes of a file: from byte `offset` of pack `pack`, or zeros when `pack` is None."""

    pack: str | None
    offset: int
    length: int


class Entry(NamedTuple):
    """A name in a directory; `kind` is its S_IFMT. `next` is where reading the directory goes on after it."""

    name: bytes
    nid: int
    kind: int
    next: int


class Inodes:
    """The inodes of `image`, which `what` names in errors. Keeps nothing of what it reads; thread-safe."""

    def __init__(self, image: Buffer, what: str = "tree image") -> None:
        self._image = memoryview(image)
        self._what = what
        self.superblock = erofs.parse_superblock(self._image[:BLOCK], len(self._image), what)
        self.packs = erofs.read_device_table(self._image, what)

    def inode(self, nid: int) -> Inode:
        """The inode with this number."""
        offset = nid * erofs.SLOT
        head = self._bytes(offset, erofs.INODE.size)
        form, count, mode, _, size, union, _, uid, gid, mtime, mtime_ns, links = erofs.INODE.unpack(head)
        layout = form >> 1
        if not form & erofs.EXTENDED or layout not in (erofs.LAYOUT_PLAIN, erofs.LAYOUT_INLINE, erofs.LAYOUT_CHUNKED):
            raise UnsupportedError(f"{self._what} has an inode of format {form:#x}", hint="upgrade Floe on this node")
        kind = stat.S_IFMT(mode)
        if kind not in erofs.FILE_TYPES or mtime_ns >= 10**9 or not links:
            raise self.damaged(f"inode {nid} has mode {mode:#o}, {mtime_ns} ns, {links} links")
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK) and (size or layout != erofs.LAYOUT_PLAIN):
            raise self.damaged(f"inode {nid} is special but holds {size} bytes")
        length = erofs.XATTR_HEADER.size + 4 * (count - 1) if count else 0
        data = offset + erofs.INODE.size + length
        return Inode(nid, mode, uid, gid, mtime, mtime_ns, links, size, layout, union, data)

    def link(self, inode: Inode) -> bytes:
        """A symlink's target."""
        if not 0 < inode.size <= erofs.LINK_MAX:
            raise self.damaged(f"inode {inode.nid} is a symlink to {inode.size} bytes")
        link = b"".join(self.block(inode, number) for number in range(blocks(inode.size)))
        if b"\0" in link:
            raise self.damaged(f"inode {inode.nid} is a symlink with a zero byte")
        return link

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes by whole name."""
        nid = inode.nid
        start = nid * erofs.SLOT + erofs.INODE.size
        body = self._bytes(start, inode.data - start)
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
                raise self.damaged(f"inode {nid} has extended attributes past their end")
            name = bytes(body[start:value_at])
            if prefix in erofs.XATTR_ACLS and not name:
                name = erofs.XATTR_ACLS[prefix]
            elif prefix in erofs.XATTR_PREFIXES and name and b"\0" not in name:
                name = erofs.XATTR_PREFIXES[prefix] + name
            else:
                raise self.damaged(f"inode {nid} has an extended attribute of unknown kind {prefix}")
            if name in found or len(name) > erofs.NAME_MAX:
                raise self.damaged(f"inode {nid} has extended attribute {name!r} twice, or its name is too long")
            found[name] = bytes(body[value_at : value_at + value_length])
        return found

    # files

    def chunk_bits(self, inode: Inode) -> int:
        """log2 of the chunk size of a regular file that is not empty."""
        if inode.layout != erofs.LAYOUT_CHUNKED:
            raise UnsupportedError(f"{self._what} has file data inside", hint="upgrade Floe on this node")
        bits = erofs.BLOCK_BITS + (inode.union & 0x1F)
        if inode.union & ~0x3F or not inode.union & erofs.CHUNK_INDEXES or bits != chunk_bits(inode.size):
            raise self.damaged(f"inode {inode.nid} of {inode.size} bytes has chunk format {inode.union:#x}")
        return bits

    def chunks(self, inode: Inode, first: int, stop: int) -> list[Extent]:
        """The chunks `first` to `stop` of a regular file, one extent each; the last ends where the file ends."""
        bits = self.chunk_bits(inode)
        start = inode.data + -inode.data % erofs.CHUNK_INDEX.size + first * erofs.CHUNK_INDEX.size
        table = self._bytes(start, (stop - first) * erofs.CHUNK_INDEX.size)
        found = []
        for number, (_, device, block) in enumerate(erofs.CHUNK_INDEX.iter_unpack(table), first):
            length = min(1 << bits, inode.size - (number << bits))
            if block == erofs.HOLE:
                found.append(Extent(None, 0, length))
                continue
            if not 0 < device <= len(self.packs):
                raise self.damaged(f"inode {inode.nid} has data in pack {device} of {len(self.packs)}")
            pack_id, size = self.packs[device - 1]
            if block + blocks(length) > size:
                raise self.damaged(f"inode {inode.nid} has data past the end of pack {pack_id}")
            found.append(Extent(pack_id, block * BLOCK, length))
        return found

    def extents(self, inode: Inode, offset: int, length: int) -> list[Extent]:
        """Where `length` bytes from `offset` of a regular file lie, cut at its end; what is adjacent is one extent."""
        stop = min(offset + length, inode.size)
        if stop <= offset:
            return []
        bits = self.chunk_bits(inode)
        first = offset >> bits
        merged: list[Extent] = []
        for number, chunk in enumerate(self.chunks(inode, first, (stop - 1 >> bits) + 1), first):
            start = number << bits
            skip = max(offset - start, 0)
            at = 0 if chunk.pack is None else chunk.offset + skip
            piece = Extent(chunk.pack, at, min(stop - start, chunk.length) - skip)
            last = merged[-1] if merged else None
            if last and last.pack == piece.pack and (piece.pack is None or last.offset + last.length == piece.offset):
                merged[-1] = last._replace(length=last.length + piece.length)
            else:
                merged.append(piece)
        return merged

    # directories

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        """The inode number of `name`, found by halves: blocks and the names in them are sorted."""
        low, high = 0, blocks(directory.size)
        while high - low > 1:
            middle = (low + high) // 2
            if self._first_name(directory, middle) <= name:
                low = middle
            else:
                high = middle
        if not high:
            return None
        entries = self.block_entries(directory, low)
        at = bisect_left(entries, (name,))
        return entries[at].nid if at < len(entries) and entries[at].name == name else None

    def entries(self, directory: Inode, start: int = 0) -> Iterator[Entry]:
        """The entries in order of their names, with `.` and `..`; `start` is 0 or the `next` of the last one read."""
        number, skip = divmod(start, BLOCK)
        while number < blocks(directory.size):
            yield from self.block_entries(directory, number)[skip:]
            number, skip = number + 1, 0

    def block_entries(self, directory: Inode, number: int) -> list[Entry]:
        """The entries in one block of a directory, in the order of the block."""
        nid, block = directory.nid, self.block(directory, number)
        first = self._first_offset(nid, block)
        table = list(erofs.DIRENT.iter_unpack(block[:first]))
        ends = [*(offset for _, offset, _, _ in table[1:]), len(block)]
        found = []
        for position, ((child, offset, file_type, _), end) in enumerate(zip(table, ends, strict=True), 1):
            name = block[offset:end]
            if end == len(block):
                name = name.rstrip(b"\0")
            if offset < first or not 0 < len(name) <= erofs.NAME_MAX or b"/" in name or b"\0" in name:
                raise self.damaged(f"directory {nid} has {name!r} for a name")
            if file_type not in _KIND_BY_TYPE:
                raise self.damaged(f"directory {nid} has an entry of unknown type {file_type}")
            after = (number + 1) * BLOCK if position == len(table) else number * BLOCK + position
            found.append(Entry(name, child, _KIND_BY_TYPE[file_type], after))
        return found

    def _first_name(self, directory: Inode, number: int) -> bytes:
        block = self.block(directory, number)
        first = self._first_offset(directory.nid, block)
        second = erofs.DIRENT.unpack_from(block, erofs.DIRENT.size)[1] if first > erofs.DIRENT.size else len(block)
        return block[first:second].rstrip(b"\0")

    def _first_offset(self, nid: int, block: bytes) -> int:
        size = erofs.DIRENT.size
        first = int.from_bytes(block[8:10], "little") if len(block) >= size else 0
        if not first or first % size or first > len(block):
            raise self.damaged(f"directory {nid} has a block that cannot be one")
        return first

    # bytes

    def damaged(self, detail: str) -> DamagedError:
        """The error to raise."""
        return DamagedError(f"{self._what} is damaged: {detail}", hint="push its model or index its image again")

    def block(self, inode: Inode, number: int) -> bytes:
        """One block of a directory or symlink; the last is as long as its content."""
        length = min(BLOCK, inode.size - number * BLOCK)
        if inode.layout == erofs.LAYOUT_PLAIN:
            return bytes(self._bytes((inode.union + number) * BLOCK, length))
        if inode.layout != erofs.LAYOUT_INLINE:
            raise self.damaged(f"inode {inode.nid} has layout {inode.layout}, which its type cannot have")
        if (number + 1) * BLOCK < inode.size:
            return bytes(self._bytes((inode.union + number) * BLOCK, length))
        if inode.data % BLOCK + length > BLOCK:
            raise self.damaged(f"inode {inode.nid} has inline data across two blocks")
        return bytes(self._bytes(inode.data, length))

    def _bytes(self, offset: int, length: int) -> memoryview:
        if offset < 0 or length < 0 or offset + length > len(self._image):
            raise self.damaged(f"{length} bytes at {offset} lie outside of the image")
        return self._image[offset : offset + length]
