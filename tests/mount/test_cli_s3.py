"""The command line on an S3 store: what works, and what is said when it cannot."""

import pytest
from support import seaweed
from support.floe_node import Node


@pytest.fixture
def node(tmp_path):
    server = seaweed.running()
    node = Node(tmp_path)
    node.environ |= {
        "FLOE_STORE": server.url(server.bucket(), "models/here"),
        "AWS_ACCESS_KEY_ID": seaweed.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": seaweed.SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(bytes(range(256)) * 40000)
    yield node
    node.clean_up()


def listed(node):
    return [(model["ref"], model["manifest"]) for model in node.json("model", "ls")]


def test_push_list_show_remove(node, tmp_path):
    pushed = node.json("model", "push", tmp_path / "m", "iris")
    assert pushed["new_packs"] == 1
    assert listed(node) == [("iris:latest", pushed["manifest"])]
    again = node.json("model", "push", tmp_path / "m", "iris:v2")
    assert (again["new_packs"], again["tree"]) == (0, pushed["tree"])
    node.floe("model", "rm", "iris")
    assert listed(node) == [("iris:v2", again["manifest"])]


def test_wrong_credentials_are_named_as_such_and_change_nothing(node, tmp_path):
    node.json("model", "push", tmp_path / "m", "iris")
    before = listed(node)
    right = dict(node.environ)
    for changes in (
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        {"AWS_ACCESS_KEY_ID": "nobody"},
        {"AWS_ACCESS_KEY_ID": seaweed.READER_KEY, "AWS_SECRET_ACCESS_KEY": seaweed.READER_SECRET},  # may not write
    ):
        node.environ = {**right, **changes}
        told = node.floe("model", "push", tmp_path / "m", "other", code=1).stderr
        assert "floe: hint: check the access key" in told
        assert seaweed.SECRET_KEY not in told
    node.environ = right
    assert listed(node) == before


def test_no_such_bucket(node, tmp_path):
    node.environ["FLOE_STORE"] = node.environ["FLOE_STORE"].replace("/models/here", "-not/models")
    for argv in (["model", "ls"], ["model", "push", tmp_path / "m", "iris"]):
        assert "create the bucket" in node.floe(*argv, code=1).stderr


def test_no_credentials_at_all(node, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del node.environ[name]
    node.environ |= {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
    node.floe("model", "push", tmp_path / "m", "iris", code=1)
