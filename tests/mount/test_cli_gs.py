"""The command line on a gs:// store: pushed, listed, mounted, read, removed."""

import os

import pytest
from support.fakegcs import FakeGCS
from support.floe_node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    with FakeGCS() as google:
        made.environ["FLOE_STORE"] = google.address(google.bucket(), "models/here")
        yield made
        made.clean_up()


def test_push_mount_read_remove(node, tmp_path):
    content = os.urandom(20 << 20)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(content)
    pushed = node.json("model", "push", tmp_path / "m", "iris")
    assert node.json("model", "ls")[0]["manifest"] == pushed["manifest"]
    place = tmp_path / "mnt"
    place.mkdir()
    node.floe("model", "mount", "iris", place)
    assert (place / "weights").read_bytes() == content
    node.floe("umount", place)
    node.floe("model", "rm", "iris")
    assert node.json("model", "ls") == []
