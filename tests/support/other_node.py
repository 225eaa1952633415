"""A node that starts what another one published: a containerd of its own, with Floe's daemons on the same store and index, or without."""

from support.containerd import Containerd
from support.floe_daemons import Daemons


def started(stack, version, node, tmp_path, *, floe=True):
    """The containerd, which knows the registry of `node`, and its daemons, or None; `stack` stops both."""
    settings, daemons = {}, None
    if floe:
        environ = {key: node.environ[key] for key in ("FLOE_STORE", "FLOE_INDEX")}
        daemons = Daemons(tmp_path / "h", environ)
        stack.callback(daemons.close)
        settings = {"snapshotter_address": daemons.address, "snapshotter_root": daemons.root}
    daemon = Containerd(version, tmp_path, registries=(node.registry.host,), **settings)
    stack.callback(daemon.stop)
    return daemon, daemons
