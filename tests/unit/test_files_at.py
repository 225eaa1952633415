"""From places of packs to files of a tree."""

import random
import stat

from support.trees import TestPack, file_node

from floe.ingest.entries import Node
from floe.ingest.erofs_writer import build_image
from floe.store.erofs_inodes import Inodes
from floe.store.filesat import files_at

BIG = random.Random(1).randbytes((4 << 20) + 300_000)


def test_a_place_is_named_by_the_files_that_have_content_there():
    pack = TestPack("pack")
    root, folder = Node(stat.S_IFDIR | 0o755), Node(stat.S_IFDIR | 0o755)
    folder.children[b"small"] = file_node(pack, b"s" * 5000)  # blocks 0 and 1
    folder.children[b"other"] = file_node(pack, b"o" * 5000)  # 2 and 3
    root.children[b"a"] = folder
    root.children[b"big"] = file_node(pack, BIG)  # two chunks from block 4 on
    root.children[b"empty"] = file_node(pack, b"")
    root.children[b"holes"] = file_node(pack, bytes(9000))
    image = Inodes(build_image(root, {pack.id: pack.blocks}))
    found = files_at(
        image,
        [
            (pack.id, 8192, 100),
            (pack.id, 4096, 8192),
            (pack.id, 4 * 4096 + (4 << 20), 1000),
            (pack.id, 0, pack.blocks * 4096),
            (pack.id, pack.blocks * 4096, 10),
            ("f" * 64, 0, 10),
        ],
    )
    assert found == [[b"a/other"], [b"a/small", b"a/other"], [b"big"], [b"a/small", b"a/other", b"big"], [], []]
