"""Which frames a tree needs, in the order of its files, and when a pack is wanted as a whole."""

import random
import stat

from support.trees import TestPack, file_node

from floe.ingest.entries import Node
from floe.ingest.erofs_writer import build_image
from floe.store.erofs_inodes import Inodes
from floe.store.replay import Run
from floe.store.treecontent import Content, content_of, filled, whole_packs

MIB = 1 << 20
FRAME = 128 << 10


def content(seed, size):
    return random.Random(seed).randbytes(size)


def image(root, *packs):
    return Inodes(build_image(root, {pack.id: pack.blocks for pack in packs}))


def test_frames_come_in_the_order_of_files_each_once():
    pack = TestPack("one")
    root = Node(stat.S_IFDIR | 0o755)
    root.children[b"z"] = file_node(pack, content(1, 3 * FRAME))
    root.children[b"a"] = file_node(pack, content(2, 200_000))  # ends within a frame, in which the next one begins
    root.children[b"b"] = file_node(pack, content(3, 100_000))
    root.children[b"empty"] = file_node(pack, b"")
    found = content_of(image(root, pack), {pack.id: FRAME})
    assert found.runs == (Run(pack.id, 0, 6),)  # near each other: in the order of the pack, for few requests
    assert found.masks == {pack.id: 0b111111}


def test_far_apart_the_order_of_files_counts():
    first, second = TestPack("first"), TestPack("second")
    root = Node(stat.S_IFDIR | 0o755)
    root.children[b"a"] = file_node(second, content(1, 66 * MIB))
    root.children[b"b"] = file_node(first, content(2, 66 * MIB))
    found = content_of(image(root, first, second), {first.id: MIB, second.id: MIB})
    assert [(run.pack_id, run.first, run.stop) for run in found.runs] == [
        (second.id, 0, 64),
        (second.id, 64, 66),
        (first.id, 0, 64),
        (first.id, 64, 66),
    ]


def test_what_others_put_into_a_pack_is_left_out_and_so_are_packs_that_are_not_known():
    pack, unknown = TestPack("shared"), TestPack("unknown")
    foreign = file_node(pack, content(1, 10 * FRAME))
    root = Node(stat.S_IFDIR | 0o755)
    root.children[b"a"] = file_node(pack, content(2, 2 * FRAME))
    root.children[b"b"] = file_node(unknown, content(3, FRAME))
    assert foreign.content is not None
    found = content_of(image(root, pack, unknown), {pack.id: FRAME})
    assert found == Content((Run(pack.id, 10, 12),), {pack.id: 0b11 << 10})


def test_a_pack_is_wanted_whole_when_less_than_an_eighth_is_foreign():
    counts = {"a": 16, "b": 16, "gone": 4}
    masks = [{"a": (1 << 15) - 1, "b": 0xFF}, {"b": 0x3F00, "lost": 1}]
    assert whole_packs(masks, counts) == {"a"}  # of b two are foreign to both, which is an eighth
    assert whole_packs([*masks, {"b": 0x4000}], counts) == {"a", "b"}


def test_the_rest_of_a_whole_pack_comes_last():
    needed = Content((Run("a", 4, 8), Run("b", 0, 2)), {"a": 0b11110000, "b": 0b11})
    found = filled(needed, {"a", "c"}, {"a": 10, "b": 4, "c": 4})
    assert found.runs == (Run("a", 4, 8), Run("b", 0, 2), Run("a", 0, 4), Run("a", 8, 10))
    assert found.masks == {"a": (1 << 10) - 1, "b": 0b11}
    assert filled(found, {"a"}, {"a": 10}) == found
