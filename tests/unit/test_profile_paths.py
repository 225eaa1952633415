"""From reads of packs to files and frames, and from files of one tree to frames of the next."""

import random
import stat

import pytest
from support.odd_tree import odd_tree
from support.trees import TestPack, file_node

from floe.ingest.entries import Node, place_tree
from floe.ingest.erofs_writer import build_image
from floe.store.erofs_inodes import Extent, Inodes
from floe.store.nodes import find
from floe.store.profile import PIECE
from floe.store.profilepaths import Read, locate, touched

DIR = stat.S_IFDIR | 0o755
FRAME = 128 << 10
BIG = random.Random(1).randbytes((4 << 20) + 300_000)


class Tree:
    """Files in one pack, in the order given."""

    def __init__(self, files, pack="pack", prefix=""):
        self.pack = TestPack(pack)
        root = Node(DIR)
        for path, content in files.items():
            here = root
            *parents, name = path.split(b"/")
            for parent in parents:
                here = here.children.setdefault(parent, Node(DIR))
            here.children[name] = file_node(self.pack, content)
        self.root = place_tree(root, prefix) if prefix else root
        self.image = Inodes(build_image(self.root, {self.pack.id: self.pack.blocks}))
        self.sizes = {self.pack.id: FRAME}

    def read(self, path, start=0, length=None, first=0):
        """The reads that the kernel makes of a range of a file, chunk by chunk."""
        content = find(self.root, path).content
        stop = content.size if length is None else start + length
        step = 1 << content.chunkbits
        for number, chunk in enumerate(content.chunks):
            begin, end = max(start, number * step), min(stop, (number + 1) * step, content.size)
            if chunk is not None and begin < end:
                yield Read(chunk.pack_id, chunk.block * 4096 + begin - number * step, end - begin, first)

    def touched(self, *reads):
        return touched(self.image, [one for found in reads for one in found], self.sizes)


@pytest.fixture(scope="module")
def tree():
    return Tree({b"a/small": b"s" * 5000, b"a/other": b"o" * 5000, b"big": BIG, b"empty": b""})


def test_a_read_of_a_small_file_touches_it_and_not_its_neighbour(tree):
    found = tree.touched(tree.read(b"a/small", first=7))
    assert found.pieces == {(b"a/small", 0): 7}
    assert found.frames == {(0, 0): 7}


def test_a_range_of_a_large_file_touches_its_pieces_across_chunks(tree):
    start = (4 << 20) - 1000
    found = tree.touched(tree.read(b"big", start, 2000, first=3))
    assert found.pieces == {(b"big", start // PIECE): 3, (b"big", (4 << 20) // PIECE): 3}
    places = [read.offset // FRAME for read in tree.read(b"big", start, 2000)]
    assert set(found.frames) == {(0, frame) for frame in places}


def test_the_earliest_touch_counts(tree):
    found = tree.touched(
        tree.read(b"a/small", first=900), tree.read(b"a/small", first=30), tree.read(b"a/other", first=5)
    )
    assert found.pieces == {(b"a/small", 0): 30, (b"a/other", 0): 5}
    assert found.frames == {(0, 0): 5}


def test_what_belongs_to_other_trees_is_left_out(tree):
    other = "f" * 64
    past = tree.pack.blocks * 4096
    found = tree.touched([Read(other, 0, 4096, 0), Read(tree.pack.id, past, 4096, 0)])
    assert (found.frames, found.pieces) == ({}, {})
    assert touched(tree.image, tree.read(b"big"), {}) == ({}, {})  # an index that is gone


def test_hard_links_holes_and_strange_files_are_borne():
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    image = Inodes(build_image(root, {p.id: p.blocks for p in (full, small)}))
    reads = [Read(p.id, 0, p.blocks * 4096, 0) for p in (full, small) if p.blocks]
    found = touched(image, reads, {full.id: FRAME, small.id: FRAME})
    assert found.pieces
    assert len({frame for pack, frame in found.frames}) >= 1
    assert list(locate(image, sorted(found.pieces)))


def test_the_same_paths_are_found_in_the_next_version(tree):
    pieces = [(b"big", 1), (b"a/small", 0), (b"gone", 0), (b"a", 0), (b"big/below", 0), (b"empty", 0), (b"big", 999)]
    following = Tree({b"new": b"n" * 70_000, b"big": BIG[:300_000], b"a/small": b"S" * 9000}, pack="next")
    big, small = (find(following.root, path).content.chunks[0] for path in (b"big", b"a/small"))
    assert list(locate(following.image, pieces)) == [
        Extent(following.pack.id, big.block * 4096 + PIECE, PIECE),
        Extent(following.pack.id, small.block * 4096, 9000),
    ]


def test_paths_of_any_depth_are_looked_up(tree):
    deep = b"/".join([b"d"] * 2000)
    assert list(locate(tree.image, [(deep, 0), (b"/" * 3000 + b"x", 0)])) == []


def test_a_piece_that_is_cut_shorter_ends_with_its_file():
    following = Tree({b"big": BIG[: PIECE + 100]})
    (extent,) = locate(following.image, [(b"big", 1)])
    assert extent.length == 100


def test_a_model_is_found_where_it_is_placed(tree):
    placed = Tree({b"a/small": b"s" * 5000}, prefix="/opt/model")
    (extent,) = locate(placed.image, [(b"a/small", 0)], b"opt/model/")
    assert extent == Extent(placed.pack.id, 0, 5000)
    assert list(locate(placed.image, [(b"a/small", 0)])) == []
    assert placed.touched(placed.read(b"opt/model/a/small")).pieces == {(b"opt/model/a/small", 0): 0}


def test_work_pauses_for_readers(tree):
    pauses = []
    touched(tree.image, [], tree.sizes, lambda: pauses.append(1))
    assert len(pauses) == 2  # a block of names each
