"""Single inodes of an image against the tree that was written: what the portable mount answers from."""

from __future__ import annotations

import random
import stat
from itertools import pairwise

import pytest
from support.odd_tree import odd_tree
from support.trees import TestPack, content_of

from floe.ingest.entries import Chunk, FileContent, Node, link_counts
from floe.ingest.erofs_writer import build_image
from floe.store import erofs
from floe.store.erofs_inodes import Extent, Inodes
from floe.store.errors import DamagedError, FloeError

DIR = stat.S_IFDIR | 0o755


@pytest.fixture(scope="module")
def odd():
    """The odd tree, its packs' content, and its image."""
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    image = Inodes(build_image(root, {p.id: p.blocks for p in (full, small)}))
    return root, {p.id: p.data for p in (full, small)}, image


def found(image):
    """(node, inode) of every entry, by look-up from the root on."""

    def below(node, inode):
        yield node, inode
        for name, child in node.children.items():
            nid = image.lookup(inode, name)
            assert nid is not None, name
            yield from below(child, image.inode(nid))

    return lambda root: below(root, image.inode(image.superblock.root_nid))


def test_every_name_is_found_and_every_field_is_right(odd):
    root, _, image = odd
    links = link_counts(root)
    for node, inode in found(image)(root):
        assert (inode.mode, inode.uid, inode.gid) == (node.mode, node.uid, node.gid)
        assert (inode.mtime, inode.mtime_ns, inode.links) == (node.mtime, node.mtime_ns, links[id(node)])
        assert inode.rdev == node.rdev
        assert image.xattrs(inode) == node.xattrs
        if stat.S_ISLNK(node.mode):
            assert image.link(inode) == node.link
        if not node.is_dir:
            assert inode.size == node.size


def test_what_is_not_there_is_not_found(odd):
    root, _, image = odd
    for node, inode in found(image)(root):
        if node.is_dir:
            names = sorted(node.children)
            for name in (b"\0", b"~~~", *(name + b"x" for name in names[::50]), *(name[:-1] for name in names[::50])):
                if name and name not in node.children:
                    assert image.lookup(inode, name) is None
            assert image.lookup(inode, b".") == inode.nid


@pytest.mark.parametrize("at_a_time", [1, 7, 4000])
def test_a_directory_can_be_read_in_parts(odd, at_a_time):
    root, _, image = odd
    for node, inode in found(image)(root):
        if not node.is_dir:
            continue
        names, start = [], 0
        while True:
            part = [entry for entry, _ in zip(image.entries(inode, start), range(at_a_time), strict=False)]
            if not part:
                break
            assert all(entry.next > start for entry in part)
            start = part[-1].next
            names += [entry.name for entry in part]
        assert names == sorted([*node.children, b".", b".."])


def test_extents_give_the_content_of_any_range(odd):
    root, packs, image = odd
    source = random.Random("ranges")
    del_vast = {name: node for name, node in root.children.items() if name != b"vast"}
    for name, node in del_vast.items():
        if not node.is_file:
            continue
        whole = content_of(node, packs)
        inode = image.inode(image.lookup(image.inode(image.superblock.root_nid), name))
        ranges = [(0, len(whole) + 10), (len(whole), 5)]
        ranges += [(source.randrange(len(whole) + 1), source.randrange(1, 9 << 20)) for _ in range(20)]
        for at, length in ranges:
            pieces = image.extents(inode, at, length)
            read = b"".join(
                bytes(piece.length) if piece.pack is None else packs[piece.pack][piece.offset :][: piece.length]
                for piece in pieces
            )
            assert read == whole[at : at + length]
            for one, two in pairwise(pieces):
                assert one.pack != two.pack or one.offset + one.length != two.offset


def test_adjacent_chunks_are_one_extent_and_a_hole_of_a_terabyte_too():
    pack = TestPack("p")
    chunks = [pack.add(bytes([n]) * (4 << 20)) for n in range(1, 4)]
    root = Node(DIR)
    root.children[b"big"] = Node(stat.S_IFREG, content=FileContent(12 << 20, 22, tuple(chunks)))
    root.children[b"vast"] = Node(stat.S_IFREG, content=FileContent(1 << 40, 22, (None,) * (1 << 18)))
    image = Inodes(build_image(root, {pack.id: pack.blocks}))
    top = image.inode(image.superblock.root_nid)
    big, vast = (image.inode(image.lookup(top, name)) for name in (b"big", b"vast"))
    assert image.extents(big, 100, 11 << 20) == [Extent(pack.id, chunks[0].block * 4096 + 100, 11 << 20)]
    assert image.extents(vast, 3, 1 << 40) == [Extent(None, 0, (1 << 40) - 3)]


def test_damage_is_an_error_and_nothing_else():
    pack = TestPack("p")
    content = FileContent(5 << 20, 22, (pack.add(b"a" * (4 << 20)), Chunk(b"", 1 << 20, pack.id, 0)))
    root = Node(
        DIR, children={b"f%d" % n: Node(stat.S_IFREG, content=content, xattrs={b"user.a": b"b"}) for n in range(40)}
    )
    good = build_image(root, {pack.id: pack.blocks})
    source = random.Random("damage")
    for _ in range(400):
        image = bytearray(good)
        for _ in range(3):
            image[source.randrange(erofs.SUPERBLOCK_OFFSET + 128, len(image))] = source.randrange(256)
        try:
            tree = Inodes(image)
            top = tree.inode(tree.superblock.root_nid)
            for entry in list(tree.entries(top))[:100]:
                inode = tree.inode(entry.nid)
                tree.xattrs(inode)
                if stat.S_ISREG(inode.mode):
                    for piece in tree.extents(inode, 0, 1 << 30):
                        assert piece.pack is None or piece.offset + piece.length <= pack.blocks * 4096
                tree.lookup(top, entry.name)
        except FloeError:
            continue


def test_an_inode_outside_of_the_image_is_damage(odd):
    _, _, image = odd
    for nid in (1 << 40, image.superblock.blocks * 128 + 5):
        with pytest.raises(DamagedError, match="outside of the image"):
            image.inode(nid)
