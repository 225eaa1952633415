"""The EROFS writer's plan and bytes, without a kernel."""

from __future__ import annotations

import os
import stat
import time

import pytest
from support.trees import TestPack, file_node, node_facts

from floe.ingest.entries import FileContent, Node, find, mtime_parts, place_tree, tree_sizes
from floe.ingest.erofs_writer import build_image, plan_image, write_image
from floe.store import erofs
from floe.store.erofs_reader import read_image
from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.ids import hexdigest
from floe.store.packindex import BLOCK

DIR, REG, LNK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def small_tree(pack: TestPack) -> Node:
    root = Node(DIR, mtime=1_700_000_000, mtime_ns=5)
    hard = file_node(pack, b"content", uid=1000, gid=1001, xattrs={b"user.k": b"v"})
    root.children = {b"a": hard, b"b": hard, b"link": Node(LNK, link=b"a"), b"empty": Node(REG)}
    root.children[b"dir"] = Node(DIR, mtime=-1, mtime_ns=1, children={b"big": file_node(pack, b"x" * (9 << 20))})
    root.children[b"null"] = Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
    return root


def test_golden_image():
    # A change of these bytes renames every tree: it needs a reason and a line in the changelog.
    pack = TestPack("golden")
    image = build_image(small_tree(pack), {pack.id: pack.blocks})
    assert hexdigest(image) == "5c2f4eb100c03b1eea4ab8de08368d4ad9ed47164a71b0dd00ae049ecb45358c"


def test_equal_trees_give_equal_bytes_and_other_trees_other_uuids():
    pack = TestPack("p")
    first = build_image(small_tree(pack), {pack.id: pack.blocks})
    again = TestPack("p")
    assert build_image(small_tree(again), {again.id: again.blocks}) == first
    other = small_tree(pack)
    other.children[b"empty"].mtime = 7
    second = build_image(other, {pack.id: pack.blocks})
    uuids = {erofs.parse_superblock(image, len(image), "t").uuid for image in (first, second)}
    assert len(uuids) == 2


def test_order_of_children_does_not_matter():
    pack = TestPack("p")
    root = small_tree(pack)
    image = build_image(root, {pack.id: pack.blocks})
    root.children = dict(reversed(root.children.items()))
    assert build_image(root, {pack.id: pack.blocks}) == image


def test_reader_reads_what_was_written():
    pack = TestPack("p")
    root = small_tree(pack)
    image = build_image(root, {pack.id: pack.blocks})
    packs = {pack.id: pack.data}
    assert node_facts(read_image(image), packs) == node_facts(root, packs)
    assert read_image(image).children[b"a"] is not read_image(image).children[b"a"]
    back = read_image(image)
    assert back.children[b"a"] is back.children[b"b"]


def test_only_packs_in_use_are_listed():
    used, unused = TestPack("used"), TestPack("unused")
    root = Node(DIR, children={b"f": file_node(used, b"1")})
    unused.add(b"2")
    image = build_image(root, {used.id: used.blocks, unused.id: unused.blocks})
    assert erofs.read_device_table(image) == [(used.id, 1)]


def test_device_table_is_read_from_a_file(tmp_path):
    pack = TestPack("p")
    path = tmp_path / "t"
    path.write_bytes(build_image(Node(DIR, children={b"f": file_node(pack, b"1")}), {pack.id: 1}))
    assert erofs.read_device_table(path) == [(pack.id, 1)]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedError):
        erofs.read_device_table(path)


@pytest.mark.parametrize(
    ("rdev", "encoded"),
    [((0, 0), 0), ((1, 3), 0x103), ((8, 256), 0x100800), ((4095, 0xFFFFF), 0xFFFFFFFF)],
)
def test_devices_are_encoded_as_the_kernel_does(rdev, encoded):
    assert erofs.encode_device(os.makedev(*rdev)) == encoded
    assert erofs.decode_device(encoded) == os.makedev(*rdev)


def _chunky(size: int, chunks: int) -> Node:
    return Node(REG, content=FileContent(size, 22, (None,) * chunks))


TWICE = Node(DIR)


@pytest.mark.parametrize(
    ("children", "part"),
    [
        ({b"n" * 256: Node(REG)}, "no valid file name"),
        ({b"a/b": Node(REG)}, "no valid file name"),
        ({b"": Node(REG)}, "no valid file name"),
        ({b".": Node(DIR)}, "'.' or '..'"),
        ({b"l": Node(LNK, link=b"")}, "symlink"),
        ({b"l": Node(LNK, link=b"x" * 4096)}, "symlink"),
        ({b"f": Node(REG, uid=1 << 32)}, "owner"),
        ({b"f": Node(REG, gid=-1)}, "owner"),
        ({b"f": Node(REG, mtime=1 << 63)}, "time"),
        ({b"f": Node(REG, mtime_ns=10**9)}, "time"),
        ({b"f": Node(0o644)}, "mode"),
        ({b"f": _chunky(5 << 20, 1)}, "fit its size"),
        ({b"f": Node(REG, children={b"x": Node(REG)})}, "no directory"),
        ({b"d": Node(stat.S_IFBLK, rdev=os.makedev(4096, 0))}, "device"),
        ({b"d": TWICE, b"e": TWICE}, "second time"),
    ],
)
def test_what_an_image_cannot_hold_is_refused(children, part):
    with pytest.raises(BadInputError, match=part):
        plan_image(Node(DIR, children=children), {})


def test_a_cycle_and_a_root_that_is_no_directory_are_refused():
    root = Node(DIR)
    root.children[b"self"] = root
    with pytest.raises(BadInputError, match="second time"):
        plan_image(root, {})
    with pytest.raises(BadInputError, match="root"):
        plan_image(Node(REG), {})


def test_chunks_outside_of_their_pack_and_too_many_packs_are_refused():
    pack = TestPack("p")
    root = Node(DIR, children={b"f": file_node(pack, b"x" * 5000)})
    with pytest.raises(BadInputError, match="outside"):
        plan_image(root, {pack.id: 1})
    with pytest.raises(BadInputError, match="outside"):
        plan_image(root, {})
    packs = [TestPack(str(i)) for i in range(257)]
    many = Node(DIR, children={b"%d" % i: file_node(p, b"x") for i, p in enumerate(packs)})
    with pytest.raises(BadInputError, match="256 packs"):
        plan_image(many, {p.id: 1 for p in packs})


def test_inline_data_never_crosses_a_block_and_inodes_do_not_either():
    root = Node(DIR)
    for number in range(600):
        root.children[b"l%d" % number] = Node(
            LNK, link=b"x" * (number * 7 % 4095 + 1), xattrs={b"user.x": b"y" * number}
        )
    plan = plan_image(root, {})
    for place in plan.places:
        assert place.offset % BLOCK + 64 <= BLOCK
        if place.layout == erofs.LAYOUT_INLINE:
            assert place.offset // BLOCK == (place.offset + place.header + place.tail - 1) // BLOCK
    assert plan.places[0].nid < 1 << 16
    assert node_facts(read_image(write_image(plan)), {}) == node_facts(root, {})


def test_superblock_and_root_damage_are_noticed():
    image = bytearray(build_image(Node(DIR), {}))
    for data, error in [
        (b"", DamagedError),
        (bytes(4096), DamagedError),
        (bytes(image[:-1]), DamagedError),
        (bytes(image) + bytes(4096), DamagedError),
    ]:
        with pytest.raises(error):
            read_image(data)
    image[erofs.SUPERBLOCK_OFFSET + 80] |= 0x10  # an incompatible feature, with a valid checksum
    checksum = erofs.superblock_checksum(image)
    image[erofs.SUPERBLOCK_OFFSET + 4 : erofs.SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
    with pytest.raises(UnsupportedError):
        read_image(image)


def test_hundred_thousand_inodes_take_seconds():
    root = Node(DIR)
    for outer in range(100):
        below = root.children[b"%d" % outer] = Node(DIR)
        below.children = {b"file-%d" % i: Node(REG, mtime=i) for i in range(1000)}
    start = time.process_time()
    image = build_image(root, {})
    assert time.process_time() - start < 15
    assert len(image) < 16 << 20
    assert erofs.parse_superblock(image, len(image), "t").inodes == 100_101


def test_place_tree_puts_a_model_below_directories_that_look_like_those_given():
    model = Node(DIR, children={b"w": Node(REG)})
    opt = Node(stat.S_IFDIR | 0o711, uid=7, mtime=9, xattrs={b"user.x": b"1"}, children={b"other": Node(REG)})
    top = place_tree(model, "/opt/models//m", {"/opt": opt})
    assert find(top, b"opt/models/m") is model
    placed = top.children[b"opt"]
    assert (placed.mode, placed.uid, placed.mtime, placed.xattrs) == (opt.mode, 7, 9, {b"user.x": b"1"})
    assert list(placed.children) == [b"models"]
    assert placed.children[b"models"].mode == DIR
    for bad in ("opt", "/", "", "/a/../b", "/./x", "/" + "n" * 256):
        with pytest.raises(BadInputError):
            place_tree(model, bad)


def test_sizes_count_hard_links_once_and_times_before_1970_are_floored():
    pack = TestPack("p")
    sizes = tree_sizes(small_tree(pack))
    assert (sizes.files, sizes.inodes, sizes.content) == (3, 7, 7 + (9 << 20))
    assert mtime_parts(-1) == (-1, 999_999_999)
