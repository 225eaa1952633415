"""The command line with an index in Redis: push and mount, standalone and on a cluster with TLS and ACL users."""

import pytest
from support import redis_server
from support.floe_node import Node

CONTENT = bytes(range(256)) * 40000


@pytest.fixture
def nodes(tmp_path):
    """Makes machines that share a store."""
    made = []

    def make(index):
        home = tmp_path / f"node-{len(made)}"
        home.mkdir()
        node = Node(home)
        node.environ |= {"FLOE_STORE": f"file://{tmp_path}/store", "FLOE_INDEX": index}
        made.append(node)
        return node

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(CONTENT)
    yield make
    for node in made:
        node.clean_up()


def mounted(node, tmp_path, name):
    where = tmp_path / f"at-{name.replace(':', '-')}"
    node.floe("model", "mount", name, where)
    try:
        assert (where / "weights").read_bytes() == CONTENT
    finally:
        node.floe("umount", where)


@pytest.mark.slow
def test_standalone_and_without_it(nodes, tmp_path):
    server = redis_server.RedisServer(tmp_path / "redis")
    try:
        first, second = nodes(server.url()), nodes(server.url())
        assert "index        " in first.floe("status").stdout
        assert first.json("status")["index"]["state"] == "ok"
        pushed = first.json("model", "push", tmp_path / "m", "iris:1")
        assert pushed["new_packs"] == 1
        assert second.json("model", "push", tmp_path / "m", "iris:2")["new_packs"] == 0
        status = second.json("status")["index"]
        assert (status["state"], status["mode"], status["packs"]) == ("ok", "standalone", 1)
        assert f"{server.url()}, ok; standalone, version 7" in second.floe("status").stdout
        mounted(second, tmp_path, "iris:1")

        server.restart_empty()
        assert f"{server.url()}, empty: it holds nothing" in second.floe("status").stdout
        again = second.floe("model", "push", tmp_path / "m", "iris:3", "--json")
        assert '"new_packs": 0' in again.stdout
        assert "knows none of the store's 1 packs: it is filled from the bucket" in again.stderr
        assert second.json("status")["index"]["state"] == "ok"

        server.stop()
        mounted(second, tmp_path, "iris:2")
        assert f"{server.url()}, unreachable: " in second.floe("status").stdout
        without = second.floe("model", "push", tmp_path / "m", "iris:4", "--json")
        assert '"new_packs": 0' in without.stdout
        assert "deduplicating with the store's chunk tables" in without.stderr
    finally:
        server.stop()


@pytest.mark.slow
def test_a_cluster_with_tls_and_users(nodes, tmp_path):
    cluster = redis_server.cluster()
    cluster.empty()
    pusher, node = nodes(cluster.url()), nodes(cluster.url(user="node"))
    assert pusher.json("model", "push", tmp_path / "m", "iris:1")["new_packs"] == 1
    status = node.json("status")["index"]
    assert (status["state"], status["mode"], status["servers"], status["packs"]) == ("ok", "cluster", 3, 1)
    mounted(node, tmp_path, "iris:1")
    wrong = nodes(cluster.url().partition("?")[0].replace("floe@", "floe:wr0ng@") + f"?ca={cluster.tls.ca}")
    told = wrong.floe("model", "push", tmp_path / "m", "iris:2", "--json")
    assert '"new_packs": 0' in told.stdout
    assert "refused the user or the password" in told.stderr
    shown = wrong.floe("status")
    assert "unreachable: " in shown.stdout
    assert "wr0ng" not in told.stdout + told.stderr + shown.stdout + wrong.floe("status", "--json").stdout
    assert "wr0ng" not in wrong.floe("status", "--index", "redis://floe:wr0ng@/1", code=2).stderr
