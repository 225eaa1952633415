"""In which order a tree is fetched that nobody recorded."""

import stat

from support.packs import random_content
from support.trees import TestPack, file_node

from floe.ingest.entries import Node
from floe.ingest.erofs_writer import build_image
from floe.store.erofs_inodes import Inodes
from floe.store.front import from_front

MIB = 1 << 20


def test_small_files_come_first_then_large_ones_by_name_without_holes():
    pack = TestPack("weights")
    root, below = Node(stat.S_IFDIR | 0o755), Node(stat.S_IFDIR | 0o755)
    contents = {
        b"model-00002.bin": random_content(5 * MIB, 2),
        b"model-00001.bin": random_content(4 * MIB, 1) + bytes(4 * MIB) + random_content(9, 3),
        b"tokenizer.json": random_content(70_000, 4),
        b"empty": b"",
    }
    for name, content in contents.items():
        root.children[name] = file_node(pack, content)
    root.children[b"a"] = below
    below.children[b"config.json"] = file_node(pack, b"{}")
    image = Inodes(build_image(root, {pack.id: pack.blocks}))
    paused = []
    found = b"".join(
        bytes(pack.data[offset : offset + length]) for _, offset, length in from_front(image, lambda: paused.append(1))
    )
    first = contents[b"model-00001.bin"]
    assert (
        found
        == b"{}" + contents[b"tokenizer.json"] + first[: 4 * MIB] + first[8 * MIB :] + contents[b"model-00002.bin"]
    )
    assert paused
