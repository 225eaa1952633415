"""Background completion of a mounted model: by policy, across a worker's death, until the next mount is native."""

import os
import random
import signal

import pytest
from support.floe_node import Node, wait_until

from floe.protos.packfs_control import PackfsClient
from floe.store.cache import NodeCache

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20
POLICY = """
[[model_policy]]
name = "acme/*"
completion = "always"
pin = true
"""


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.clean_up()


def push(node, name, size=12 * MIB):
    folder = node.home / "model"
    folder.mkdir(exist_ok=True)
    content = random.Random(name).randbytes(size)
    (folder / "weights").write_bytes(content)
    (folder / "config.json").write_text("{}")
    node.floe("model", "push", folder, name)
    return content


def residency(node):
    (mount,) = node.json("status")["mounts"]
    return mount["residency"] or {}


def test_a_model_is_completed_and_its_next_mount_is_native(node):
    content = push(node, "acme/m:1")
    (node.home / "config.toml").write_text('completion_rate = "4MiB"' + POLICY)
    mountpoint = node.home / "mnt"
    assert not node.json("model", "mount", "acme/m:1", mountpoint)["resident"]
    client = PackfsClient(node.run_dir)
    wait_until(lambda: client.status()["counters"]["kept_held_bytes"] > 0)
    worker = client.ping()
    os.kill(worker, signal.SIGKILL)  # its successor goes on where the bitmaps say
    with (mountpoint / "weights").open("rb") as file:
        assert file.read(4096) == content[:4096]
    wait_until(lambda: residency(node).get("native_next") and residency(node)["pinned"])
    found = residency(node)
    assert (found["state"], found["completion"], found["model"], found["pinned"]) == (
        "complete",
        "always",
        "acme/m",
        True,
    )
    assert found["here_bytes"] == found["content_bytes"] >= len(content)
    assert ("native at its next mount, pinned") in node.floe("status").stdout
    metrics = node.floe("status", "--json").stdout
    assert '"complete": 1' in metrics
    node.floe("umount", mountpoint)

    assert node.json("model", "mount", "acme/m:1", mountpoint)["resident"]
    (mount,) = node.json("status")["mounts"]
    assert mount["mode"] == "native"
    assert (mountpoint / "weights").read_bytes() == content
    node.floe("umount", mountpoint)

    # The pin outlives the mount, and goes when the settings no longer ask for it.
    cache = NodeCache(node.cache)
    (pack,) = [path.name for path in cache.packs.iterdir()]
    assert [owner.partition("@")[0] for owner in cache.pins(pack)] == ["policy-acme/m"]
    (node.home / "config.toml").write_text("")
    push(node, "other/m:1", MIB)
    node.floe("model", "mount", "other/m:1", mountpoint)
    assert cache.pins(pack) == set()
    found = residency(node)
    assert (found["state"], found["completion"], found["pinned"]) == ("off", "off", False)
    assert found["here_bytes"] < found["content_bytes"]


def test_a_pin_that_the_cache_cannot_keep_is_refused_and_said(node):
    push(node, "acme/m:1")
    (node.home / "config.toml").write_text('cache_size = "8MiB"' + POLICY)
    node.floe("model", "mount", "acme/m:1", node.home / "mnt")
    wait_until(lambda: residency(node).get("state") == "full")
    found = residency(node)
    assert not found["pinned"]
    assert "cannot keep" in found["problem"]
    assert 0 < found["here_bytes"] <= 8 * MIB
    log = (node.run_dir / "packfs.log").read_text()
    assert log.count("cannot keep") == 1
    assert log.count("is not completed: the node cache is full") == 1
