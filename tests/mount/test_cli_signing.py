"""Signed models as a user has them: every command a process of its own."""

import shutil

import pytest
from support.floe_node import Node

WEIGHTS = b"weights" * 100_000


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    made.floe("key", "create", tmp_path / "key")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(WEIGHTS)
    yield made
    made.clean_up()


def trusting(node, *names):
    node.environ["FLOE_TRUSTED_KEYS"] = ",".join(str(node.home / name) for name in names)


def refused(node, *argv, code=1):
    error = node.floe(*argv, code=code).stderr
    assert node.mounts() == []
    return error


def test_only_what_is_signed_is_mounted(node, tmp_path):
    node.floe("model", "push", tmp_path / "m", "iris:1")
    pushed = node.json("model", "push", tmp_path / "m", "iris:2", "--signing-key", tmp_path / "key")
    trusting(node, "key.pub")
    place = tmp_path / "mnt"
    assert "model iris:1 is not signed" in refused(node, "model", "mount", "iris:1", place)
    node.floe("model", "mount", "iris:2", place)
    assert (place / "w").read_bytes() == WEIGHTS
    node.floe("umount", place)
    # The tag is made to name something else, by its file or by its signature.
    refs = tmp_path / "store/refs/models/_/iris"
    good = (refs / "2").read_bytes()
    (tmp_path / "m" / "w").write_bytes(b"something else")
    other = node.json("model", "push", tmp_path / "m", "iris:3")["manifest"]
    (refs / "2").write_bytes(good.replace(pushed["manifest"].encode(), other.encode()))
    assert "altered" in refused(node, "model", "mount", "iris:2", place)
    shutil.copy(refs / "3", refs / "2")
    assert "is not signed" in refused(node, "model", "mount", "iris:2", place)
    assert "is not signed" in refused(node, "model", "mount", f"iris@{other}", place)
    (refs / "3").write_bytes(good)
    assert "altered" in refused(node, "model", "mount", "iris:3", place)
    # Once signed, it is mounted; so is what is named by its digest.
    node.floe("model", "sign", "iris:2", "--signing-key", tmp_path / "key")
    node.floe("model", "mount", f"iris@{other}", place)
    assert (place / "w").read_bytes() == b"something else"


def test_the_portable_mount_asks_for_signatures_too(node, tmp_path):
    node.floe("model", "push", tmp_path / "m", "iris")
    trusting(node, "key.pub")
    place = tmp_path / "mnt"
    assert "is not signed" in refused(node, "model", "mount", "--portable", "iris", place)
    node.floe("model", "sign", "iris", "--signing-key", tmp_path / "key")
    node.floe("model", "mount", "--portable", "iris", place)
    assert (place / "w").read_bytes() == WEIGHTS
