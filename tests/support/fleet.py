"""What a fleet runs on: a bucket in SeaweedFS, and an index in Redis, standalone or a cluster with TLS and ACL users."""

from support import redis_server, seaweed

INDEXES = ("redis", "cluster")
# What a client sends once for each connection, and not for what it looks up.
_CONNECTING = {"auth", "hello", "ping", "command", "cluster|slots", "client|setinfo"}


def environment(index, bucket=None):
    """The settings of a machine that pushes, by the kind of index; the bucket is new unless given."""
    server = seaweed.running()
    return {
        **server.environment(),
        "FLOE_STORE": server.url(bucket or server.bucket(), "fleet"),
        "FLOE_INDEX": index_url(index),
    }


def index_url(index, user="floe"):
    """The index's address; with user "node" as one that only reads, where there are users."""
    return redis_server.standalone().url() if index == "redis" else redis_server.cluster().url(user=user)


def forget_calls(index):
    """Count what an index is asked from now on."""
    for server in _servers(index):
        server.forget_calls()


def calls(index):
    """How many commands an index was asked since `forget_calls`, those of connecting left out."""
    counted = [server.calls() for server in _servers(index)]
    return sum(times for found in counted for name, times in found.items() if name not in _CONNECTING)


def _servers(index):
    return [redis_server.standalone()] if index == "redis" else redis_server.cluster().nodes
