"""Is an image safe to hand to the kernel, or to read? All of it is looked at once, before the first mount.

Images come from the store, which others can write; the kernel's EROFS trusts more than it should. An image passes when
it is what Floe's writer could have made: its directories, types and links agree, and no inodes claim more bytes together than
the image holds, so that the work is bounded by its size. No node is made: 100,000 inodes take half a second.
"""

from __future__ import annotations

import stat
from itertools import pairwise

from floe.store import erofs
from floe.store.erofs_inodes import Inode, Inodes
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import Buffer
from floe.store.nodes import CHUNK_BITS, INODES_MAX, MIN_CHUNK_BITS, blocks

RULES = 1  # raised when an image may fail that passed before: what was checked by older rules is checked again
_KINDS = {number: kind for kind, number in erofs.FILE_TYPES.items()}
_PLAIN, _INLINE = erofs.LAYOUT_PLAIN, erofs.LAYOUT_INLINE
_FILE = erofs.EXTENDED | erofs.LAYOUT_CHUNKED << 1  # the format of an inode with content


def check_image(image: Buffer, what: str = "tree image") -> None:
    """Return if the EROFS image is sound; `what` names it in DamagedError and UnsupportedError."""
    _Checker(bytes(image) if isinstance(image, bytearray) else image, what).run()


class _Checker:
    def __init__(self, image: Buffer, what: str) -> None:
        self._inodes = Inodes(image, what)
        self._what = what
        self._image = memoryview(image).toreadonly()
        self._devices = [0, *(size for _, size in self._inodes.packs)]  # blocks; numbers count from 1
        self._kinds: dict[int, int] = {}  # nid -> S_IFMT
        self._links: dict[int, int] = {}  # nid -> names not found yet, of what is no directory
        self._directories: list[tuple[Inode, int]] = []  # to be read: and its parent's nid
        self._left = len(self._image)  # bytes that no inode has claimed

    def run(self) -> None:
        superblock = self._inodes.superblock
        if superblock.inodes > INODES_MAX:
            raise UnsupportedError(
                f"{self._what} has {superblock.inodes} inodes; at most {INODES_MAX} are mounted",
                hint="split what it holds over several layers or models",
            )
        root = superblock.root_nid
        if self._new(root, root) != stat.S_IFDIR:
            raise self._damaged("the root is not a directory")
        while self._directories:
            self._directory(*self._directories.pop())
        if any(self._links.values()):
            nid = next(nid for nid, left in self._links.items() if left)
            raise self._damaged(f"inode {nid} has another number of names than links")
        if len(self._kinds) != superblock.inodes:
            raise self._damaged(f"{len(self._kinds)} inodes were found, {superblock.inodes} announced")

    def _damaged(self, detail: str) -> DamagedError:
        return self._inodes.damaged(detail)

    def _claim(self, length: int) -> None:
        self._left -= length
        if self._left < 0:
            raise self._damaged("its inodes claim more bytes than it has")

    # inodes

    def _new(self, nid: int, parent: int) -> int:
        """Check an inode that was not seen before, but not what a directory holds; its S_IFMT."""
        if len(self._kinds) >= self._inodes.superblock.inodes:
            raise self._damaged("it has more inodes than announced")
        offset = nid * erofs.SLOT
        if offset + erofs.INODE.size > len(self._image):
            raise self._damaged(f"inode {nid} lies outside of the image")
        form, count, mode, zero, size, union, _, _, _, _, nanoseconds, links = erofs.INODE.unpack_from(
            self._image, offset
        )
        if zero:
            raise self._damaged(f"inode {nid} uses what must be zero")
        if form == _FILE and not count and stat.S_ISREG(mode) and size and links and nanoseconds < 10**9:
            data = offset + erofs.INODE.size  # nearly always
            kind = stat.S_IFREG
            self._content(nid, size, union, data)
        else:
            inode = self._inodes.inode(nid)
            kind, data = stat.S_IFMT(mode), inode.data
            if count:
                self._inodes.xattrs(inode)
            self._other(inode, kind, parent)
        self._claim(data - offset)
        self._kinds[nid] = kind
        if kind != stat.S_IFDIR:
            self._links[nid] = links
        return kind

    def _other(self, inode: Inode, kind: int, parent: int) -> None:
        if kind == stat.S_IFDIR:
            if inode.layout not in (_PLAIN, _INLINE):
                raise self._damaged(f"directory {inode.nid} has layout {inode.layout}")
            self._claim(inode.size)
            self._directories.append((inode, parent))
        elif kind == stat.S_IFLNK:
            self._claim(inode.size)
            self._inodes.link(inode)
        elif kind == stat.S_IFREG:
            if inode.size and inode.layout != erofs.LAYOUT_CHUNKED:
                raise UnsupportedError(f"{self._what} has file data inside", hint="upgrade Floe on this node")
            if inode.size:
                self._content(inode.nid, inode.size, inode.union, inode.data)
            elif inode.layout != _PLAIN:
                raise self._damaged(f"inode {inode.nid} is empty but has layout {inode.layout}")

    def _content(self, nid: int, size: int, union: int, data: int) -> None:
        """The chunk indexes of a regular file that is not empty, behind byte `data`."""
        bits = (size - 1).bit_length()
        bits = MIN_CHUNK_BITS if bits < MIN_CHUNK_BITS else min(bits, CHUNK_BITS)
        if union != erofs.CHUNK_INDEXES | bits - erofs.BLOCK_BITS:
            raise self._damaged(f"inode {nid} of {size} bytes has chunk format {union:#x}")
        entry = erofs.CHUNK_INDEX
        start = data + -data % entry.size
        count = -(-size >> bits)
        self._claim(count * entry.size)
        if start + count * entry.size > len(self._image):
            raise self._damaged(f"inode {nid} has its map outside of the image")
        devices = self._devices
        last, full = blocks(size - (count - 1 << bits)), 1 << bits - erofs.BLOCK_BITS
        indexes = entry.iter_unpack(self._image[start : start + count * entry.size])
        for number, (advice, device, block) in enumerate(indexes, 1):
            need = last if number == count else full
            if block == erofs.HOLE:
                fits = device < len(devices)
            else:
                fits = 0 < device < len(devices) and block + need <= devices[device]
            if advice or not fits:
                raise self._damaged(f"inode {nid} has data outside of its packs, at block {block} of pack {device}")

    # directories

    def _directory(self, directory: Inode, parent: int) -> None:
        links, kinds, left = 2, self._kinds, self._links
        dots = {b".": directory.nid, b"..": parent}
        last = b""
        for number in range(blocks(directory.size)):
            names, entries = self._block(directory, number, last)
            last = names[-1]
            for name, (nid, _, file_type, zero) in zip(names, entries, strict=True):
                expected = _KINDS.get(file_type)
                if zero or expected is None:
                    raise self._damaged(f"directory {directory.nid} has an entry of unknown type {file_type}")
                if name in dots:
                    if dots.pop(name) != nid or expected != stat.S_IFDIR:
                        raise self._damaged(f"directory {directory.nid} does not name itself and its parent")
                    continue
                kind = kinds.get(nid)
                if kind is None:
                    kind = self._new(nid, directory.nid)
                elif kind == stat.S_IFDIR:
                    raise self._damaged(f"directory {name!r} is found at two places")
                if kind != expected:
                    raise self._damaged(f"{name!r} is of another type than its directory says")
                if kind == stat.S_IFDIR:
                    links += 1
                else:
                    left[nid] -= 1
        if dots:
            raise self._damaged(f"directory {directory.nid} does not name itself and its parent")
        if links != directory.links:
            raise self._damaged(f"a directory with {links - 2} subdirectories has {directory.links} links")

    def _block(self, directory: Inode, number: int, last: bytes) -> tuple[list[bytes], list[tuple[int, ...]]]:
        """Names and entries of one block of a directory; the names come after `last`."""
        nid = directory.nid
        block = self._inodes.block(directory, number)
        first = int.from_bytes(block[8:10], "little") if len(block) >= erofs.DIRENT.size else 0
        if not first or first % erofs.DIRENT.size or first > len(block):
            raise self._damaged(f"directory {nid} has a block that cannot be one")
        entries = list(erofs.DIRENT.iter_unpack(block[:first]))
        content = block.rstrip(b"\0")
        offsets = [offset for _, offset, _, _ in entries]
        ends = [*offsets, max(len(content), first)]
        names = [content[start:end] for start, end in pairwise(ends)]
        text = content[first:]
        if b"/" in text or b"\0" in text or not all(0 < end - start <= erofs.NAME_MAX for start, end in pairwise(ends)):
            raise self._damaged(f"directory {nid} has a name that cannot be one")
        if names[0] <= last or any(one >= two for one, two in pairwise(names)):
            raise self._damaged(f"directory {nid} is not sorted")
        return names, entries
