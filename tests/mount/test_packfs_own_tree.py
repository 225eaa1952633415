"""A daemon that runs from a Floe mount, in that its libraries lie on one, does not start."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from floe.ingest.entries import Chunk, FileContent, Node, chunk_bits
from floe.ingest.erofs_writer import build_image
from floe.store.ids import hexdigest
from floe.store.trees import TreeStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class NoStore:
    url = "none:"


def library():
    """A library that Python has mapped anyway."""
    for line in Path("/proc/self/maps").read_text().split("\n"):
        path = line.split(None, 5)[-1] if line else ""
        if "/libm.so" in path or "/libm-" in path:
            return Path(path)
    pytest.skip("this Python is not linked with libm")
    raise AssertionError


@pytest.fixture
def library_on_a_tree(node):
    data = library().read_bytes()
    bits = chunk_bits(len(data))
    assert len(data) <= 1 << bits
    pack = node.pack(data + bytes(-len(data) % 4096))
    root = Node(stat.S_IFDIR | 0o755, mtime=1)
    content = FileContent(len(data), bits, (Chunk(b"", len(data), pack.id, 0),))
    root.children[b"libm.so"] = Node(stat.S_IFREG | 0o755, content=content)
    image = build_image(root, {pack.id: len(pack.content) // 4096})
    node.cache.add_tree(hexdigest(image), image)
    tree = TreeStore(NoStore(), node.cache).fetch_local(hexdigest(image))
    return node.mounter().mount(tree, "a") / "libm.so"


def keeper(node, environment):
    command = [sys.executable, "-m", "floe.fuse.keeper", "--run-dir", str(node.run), "--", "false"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_keeper_whose_library_lies_on_a_tree_does_not_start(node, library_on_a_tree):
    refused = keeper(node, {**os.environ, "LD_PRELOAD": str(library_on_a_tree)})
    assert refused.returncode == 1
    assert f"runs from a Floe mount: {library_on_a_tree} is mapped" in refused.stderr
    assert not (node.run / "keeper.pid").exists()
    assert "giving up" in keeper(node, dict(os.environ)).stderr  # as far as its worker, which is none
