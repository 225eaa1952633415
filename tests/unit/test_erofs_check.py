"""Images that somebody made to hurt: none of them is handed to the kernel."""

from __future__ import annotations

import stat
import struct

import pytest
from support.odd_tree import odd_tree
from support.trees import TestPack, file_node

from floe.ingest.entries import FileContent, Node
from floe.ingest.erofs_writer import build_image
from floe.store import erofs
from floe.store.erofs_check import check_image
from floe.store.erofs_inodes import Inodes
from floe.store.erofs_reader import read_image
from floe.store.errors import DamagedError, FloeError, UnsupportedError
from floe.store.packindex import BLOCK

DIR, REG = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
# Offsets in an inode, see erofs.INODE.
FORMAT, XATTRS, MODE, ZERO, SIZE, UNION, LINKS = 0, 2, 4, 6, 8, 16, 44


def sealed(image: bytearray) -> bytes:
    """With the superblock's checksum set right."""
    checksum = erofs.superblock_checksum(image)
    image[erofs.SUPERBLOCK_OFFSET + 4 : erofs.SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
    return bytes(image)


class Image:
    """An image with a directory, two files, a symlink and a hard link, to be spoiled."""

    def __init__(self) -> None:
        self.pack = TestPack("p")
        small = file_node(self.pack, b"content", xattrs={b"user.a": b"b"})
        self.root = Node(DIR)
        self.root.children = {b"dir": Node(DIR, children={b"below": Node(REG)}), b"file": small, b"hard": small}
        self.root.children |= {
            b"big": file_node(self.pack, b"x" * (9 << 20)),
            b"link": Node(stat.S_IFLNK | 0o777, link=b"file"),
            b"other": Node(DIR),
        }
        self.data = bytearray(build_image(self.root, {self.pack.id: self.pack.blocks}))
        self.tree = Inodes(bytes(self.data))

    def nid(self, *path: bytes) -> int:
        nid = self.tree.superblock.root_nid
        for name in path:
            found = self.tree.lookup(self.tree.inode(nid), name)
            assert found is not None
            nid = found
        return nid

    def inode(self, path: bytes, field: int, form: str, value: int) -> None:
        names = path.split(b"/") if path else []
        struct.pack_into("<" + form, self.data, self.nid(*names) * erofs.SLOT + field, value)

    def entry(self, name: bytes, form: str, at: int, value: int) -> None:
        """A field of the root's entry of this name, see erofs.DIRENT."""
        root = self.tree.inode(self.nid())
        number = sorted((*self.root.children, b".", b"..")).index(name)
        struct.pack_into("<" + form, self.data, root.data + number * erofs.DIRENT.size + at, value)

    def rename(self, old: bytes, new: bytes) -> None:
        at = self.data.index(b"other", self.tree.inode(self.nid()).data) if old == b"other" else self.data.index(old)
        self.data[at : at + len(new)] = new

    def seal(self) -> bytes:
        return sealed(self.data)

    def chunk(self, path: bytes, number: int, advice: int, device: int, block: int) -> None:
        inode = self.tree.inode(self.nid(path))
        at = inode.data + -inode.data % 8 + number * 8
        erofs.CHUNK_INDEX.pack_into(self.data, at, advice, device, block)

    def superblock(self, at: int, form: str, value: int) -> None:
        struct.pack_into("<" + form, self.data, erofs.SUPERBLOCK_OFFSET + at, value)


def test_what_floe_writes_is_sound():
    full, small = TestPack("full"), TestPack("small")
    check_image(build_image(odd_tree(full, small), {p.id: p.blocks for p in (full, small)}))
    check_image(build_image(Node(DIR), {}))
    check_image(Image().seal())


SPOILED = {
    "a directory within itself": lambda i: i.entry(b"dir", "Q", 0, i.nid()),
    "a directory at two places": lambda i: i.entry(b"other", "Q", 0, i.nid(b"dir")),
    "an inode outside of the image": lambda i: i.entry(b"file", "Q", 0, 1 << 40),
    "the last inode, cut off": lambda i: i.entry(b"file", "Q", 0, len(i.data) // 32 - 1),
    "an entry of another type": lambda i: i.entry(b"file", "B", 10, 2),
    "an entry of no type": lambda i: i.entry(b"file", "B", 10, 9),
    "an entry with what must be zero": lambda i: i.entry(b"file", "B", 11, 1),
    "`.` elsewhere": lambda i: i.entry(b".", "Q", 0, i.nid(b"dir")),
    "`..` elsewhere": lambda i: i.entry(b"..", "Q", 0, i.nid(b"dir")),
    "a slash in a name": lambda i: i.rename(b"other", b"ot/er"),
    "a zero in a name": lambda i: i.rename(b"other", b"ot\0er"),
    "names out of order": lambda i: i.rename(b"other", b"aaaaa"),
    "a name before its block's text": lambda i: i.entry(b"file", "H", 8, 12),
    "a name past the block": lambda i: i.entry(b"other", "H", 8, 4095),
    "links too many": lambda i: i.inode(b"file", LINKS, "I", 3),
    "links too few": lambda i: i.inode(b"file", LINKS, "I", 1),
    "links of a directory": lambda i: i.inode(b"dir", LINKS, "I", 3),
    "no links": lambda i: i.inode(b"dir/below", LINKS, "I", 0),
    "a root that is a file": lambda i: i.superblock(14, "H", i.nid(b"dir", b"below")),
    "a root outside": lambda i: i.superblock(14, "H", 0xFFFF),
    "fewer inodes than announced": lambda i: i.superblock(16, "Q", 99),
    "more inodes than announced": lambda i: i.superblock(16, "Q", 2),
    "an unknown mode": lambda i: i.inode(b"file", MODE, "H", 0o644),
    "reserved bytes of an inode": lambda i: i.inode(b"file", ZERO, "H", 1),
    "a compact inode": lambda i: i.inode(b"dir/below", FORMAT, "H", 0),
    "an unknown layout": lambda i: i.inode(b"dir/below", FORMAT, "H", 1 | 3 << 1),
    "compressed data": lambda i: i.inode(b"big", FORMAT, "H", 1 | 1 << 1),
    "data inside of the image": lambda i: i.inode(b"file", FORMAT, "H", 1 | 2 << 1),
    "a file larger than its map": lambda i: i.inode(b"big", SIZE, "Q", 1 << 50),
    "a file of negative size": lambda i: i.inode(b"big", SIZE, "Q", (1 << 64) - 5),
    "other chunks than the size has": lambda i: i.inode(b"big", UNION, "I", 0x20 | 5),
    "a map without devices": lambda i: i.inode(b"big", UNION, "I", 10),
    "a directory larger than the image": lambda i: i.inode(b"dir", SIZE, "Q", 1 << 40),
    "an empty directory": lambda i: i.inode(b"dir", SIZE, "Q", 0),
    "a directory's blocks outside": lambda i: (
        i.inode(b"dir", FORMAT, "H", 1),
        i.inode(b"dir", UNION, "I", 0xFFFFFFFE),
    ),
    "a symlink that is too long": lambda i: i.inode(b"link", SIZE, "Q", 4096),
    "a symlink to nothing": lambda i: i.inode(b"link", SIZE, "Q", 0),
    "a symlink with a zero": lambda i: i.inode(b"link", SIZE, "Q", 5),
    "attributes past the image": lambda i: i.inode(b"file", XATTRS, "H", 0xFFFF),
    "a chunk past its pack": lambda i: i.chunk(b"big", 0, 0, 1, i.pack.blocks - 3),
    "a tail past its pack": lambda i: i.chunk(b"big", 2, 0, 1, i.pack.blocks),
    "a chunk of no pack": lambda i: i.chunk(b"big", 1, 0, 0, 0),
    "a chunk of an unknown pack": lambda i: i.chunk(b"big", 1, 0, 2, 0),
    "a hole of an unknown pack": lambda i: i.chunk(b"big", 1, 0, 2, erofs.HOLE),
    "a chunk with advice": lambda i: i.chunk(b"big", 1, 1, 1, 0),
    "shared attributes": lambda i: i.superblock(44, "I", 1),
    "compression": lambda i: i.superblock(84, "H", 1),
    "a metadata block": lambda i: i.superblock(40, "I", 1),
    "a packed inode": lambda i: i.superblock(96, "Q", 5),
    "an unknown compatible feature": lambda i: i.superblock(8, "I", 0x7),
    "an unknown incompatible feature": lambda i: i.superblock(80, "I", 0x8C),
    "more blocks than it has": lambda i: i.superblock(36, "I", 5000),
    "a device table outside": lambda i: i.superblock(88, "H", 0xFFFF),
    "more devices than allowed": lambda i: i.superblock(86, "H", 257),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_spoiled_is_refused(case):
    image = Image()
    before = bytes(image.data)
    SPOILED[case](image)
    spoiled = image.seal()
    assert spoiled != before
    with pytest.raises((DamagedError, UnsupportedError)):
        check_image(spoiled)


def test_inodes_that_share_their_maps_do_not_multiply_the_work():
    # Each of 4000 files claims the whole image behind it as its map: half a billion entries in one megabyte.
    root = Node(DIR)
    root.children = {b"f%d" % n: Node(REG, content=FileContent(1 << 20, 20, (None,))) for n in range(4000)}
    data = bytearray(build_image(root, {}))
    tree = Inodes(bytes(data))
    for entry in tree.entries(tree.inode(tree.superblock.root_nid)):
        if entry.kind == stat.S_IFREG:
            room = (len(data) - entry.nid * erofs.SLOT - 128) // 8
            struct.pack_into("<Q", data, entry.nid * erofs.SLOT + SIZE, room << 22)
            struct.pack_into("<I", data, entry.nid * erofs.SLOT + UNION, erofs.CHUNK_INDEXES | 10)
    with pytest.raises(DamagedError, match=r"claim more bytes|outside of its packs"):
        check_image(sealed(data))


def test_more_inodes_than_are_mounted_are_refused_before_any_is_read():
    image = Image()
    image.superblock(16, "Q", 1 << 40)
    for read in (check_image, read_image):
        with pytest.raises(UnsupportedError, match="at most"):
            read(image.seal())


def links_to_one_block(count: int) -> bytes:
    """An image whose symlinks all have the same block for their target: each 4095 bytes, of 64 that it takes."""
    names = [b"%06x" % number for number in range(count)]
    first = 2 * BLOCK // erofs.SLOT  # the inodes, after the superblock's block and that of the target
    entries = [(b".", 40, 2), (b"..", 40, 2), *((name, first + 2 * at, 7) for at, name in enumerate(names))]
    full = (BLOCK - 24) // (erofs.DIRENT.size + 6)
    pages = []
    for at in range(0, len(entries), full):
        head, said = b"", b""
        page = entries[at : at + full]
        for name, nid, kind in page:
            head += erofs.DIRENT.pack(nid, erofs.DIRENT.size * len(page) + len(said), kind, 0)
            said += name
        pages.append(head + said)
    start = -(-(2 * BLOCK + count * 64) // BLOCK)
    data = bytearray((start + len(pages)) * BLOCK)
    data[BLOCK : BLOCK + 4095] = b"x" * 4095
    for at in range(count):
        link = (1, 0, stat.S_IFLNK | 0o777, 0, 4095, 1, at, 0, 0, 0, 0, 1)
        erofs.INODE.pack_into(data, first * erofs.SLOT + 64 * at, *link)
    for at, page in enumerate(pages):
        data[(start + at) * BLOCK : (start + at) * BLOCK + len(page)] = page
    size = (len(pages) - 1) * BLOCK + len(pages[-1])
    erofs.INODE.pack_into(data, 40 * erofs.SLOT, 1, 0, DIR, 0, size, start, 0, 0, 0, 0, 0, 2)
    features, blocks = (erofs.COMPAT_CHECKSUM | 2, 12, 0, 40, count + 1, 0, 0), len(data) // BLOCK
    more = (blocks, 0, 0, bytes(16), bytes(16), erofs.INCOMPAT_CHUNKED, *bytes(8))
    erofs.SUPERBLOCK.pack_into(data, erofs.SUPERBLOCK_OFFSET, erofs.MAGIC, 0, *features, *more)
    return sealed(data)


def test_inodes_that_share_their_bytes_are_refused_where_a_tree_is_only_read_too():
    assert read_image(links_to_one_block(3)).children[b"000002"].link == b"x" * 4095
    for read in (check_image, read_image):
        with pytest.raises(DamagedError, match="claim more bytes"):
            read(links_to_one_block(3000))


def test_every_single_byte_of_an_image_is_checked_or_harmless():
    """Whatever byte is changed, and to whatever: what passes can be read in full."""
    good = Image().seal()
    for at in range(erofs.SUPERBLOCK_OFFSET, min(len(good), 2 * BLOCK)):
        if not good[at] and at % 8:
            continue  # of the many zeros, some
        for value in (1, good[at] ^ 0x80):
            image = bytearray(good)
            image[at] = value
            sealed(image)
            try:
                check_image(bytes(image))
            except FloeError:
                continue
            tree = Inodes(bytes(image))
            pending = [tree.inode(tree.superblock.root_nid)]
            while pending:
                inode = pending.pop()
                tree.xattrs(inode)
                if stat.S_ISDIR(inode.mode):
                    names = [e for e in tree.entries(inode) if e.name not in (b".", b"..")]
                    pending += [tree.inode(e.nid) for e in names]
                elif stat.S_ISLNK(inode.mode):
                    tree.link(inode)
                elif stat.S_ISREG(inode.mode):
                    tree.extents(inode, 0, inode.size)
