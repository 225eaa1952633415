"""An image with weights in its layers, and the one that `floe image detach --directory` makes of it: one tree, seen in containers."""

import contextlib
import json
import os
import stat
import tarfile

import pytest
from support.container_tree import ContainerTree, differences
from support.containerd import Containerd, each_version
from support.floe_daemons import Daemons
from support.floe_node import Node
from support.images import add, build_oci, busybox
from support.registry import running_registry

pytestmark = pytest.mark.slow
PLACE = "app/model"
SIZE = 6_000_000
# All that a runtime would otherwise make, so that nothing of the tree depends on when it was unpacked.
FOLDERS = ("etc", "dev", "proc", "sys", "run", "app", PLACE, f"{PLACE}/sub", f"{PLACE}/old")


def lower(tar):
    busybox(applets=("cat", "sh", "sleep"))(tar)
    for name in FOLDERS:
        add(tar, name, kind=tarfile.DIRTYPE, mode=0o755, uid=7, gid=8)
    for name in ("etc/hosts", "etc/hostname", "etc/resolv.conf", "dev/console", "etc/mtab"):
        add(tar, name, b"")
    add(tar, f"{PLACE}/big.bin", os.urandom(SIZE), mode=0o640, uid=5, mtime=1.5, xattrs={"user.a": "b"})
    add(tar, f"{PLACE}/again", kind=tarfile.LNKTYPE, link=f"{PLACE}/big.bin", mode=0o640, uid=5, mtime=1.5)
    add(tar, f"{PLACE}/gone", b"goes")
    add(tar, f"{PLACE}/link", kind=tarfile.SYMTYPE, link="sub/c", mode=0o777)
    add(tar, f"{PLACE}/sub/c", b"c" * 5000)
    add(tar, f"{PLACE}/old/x", b"hidden")
    add(tar, "app/main", b"main", mode=0o755)


def upper(tar):
    for name in ("app", PLACE):  # else their time is that of the unpacking
        add(tar, name, kind=tarfile.DIRTYPE, mode=0o755, uid=7, gid=8)
    add(tar, f"{PLACE}/.wh.gone")
    add(tar, f"{PLACE}/old", kind=tarfile.DIRTYPE, mode=0o700)
    add(tar, f"{PLACE}/old/.wh..wh..opq")
    add(tar, f"{PLACE}/old/y", b"y")
    add(tar, "app/more", b"more")


def without_marker(found):
    """But for what the stub layer has of its own."""
    return {path: fact for path, fact in found.items() if not path.startswith(b"/.floe")}


def linked(fact):
    """How many links a directory has depends on whether overlayfs merges it."""
    return (*fact[:4], 0, *fact[5:]) if stat.S_ISDIR(fact[0]) else fact


@each_version()
def test_a_container_sees_the_same(version, tmp_path):
    with contextlib.ExitStack() as stack:
        node = Node(tmp_path)
        stack.callback(node.clean_up)
        registry = stack.enter_context(running_registry(tmp_path / "registry"))
        source = registry.push(build_oci(tmp_path / "image", [lower, upper]).source, "app:fat")
        target = f"{registry.host}/app:lean"
        argv = ("image", "detach", "--plain-http", source, target, "--directory", f"/{PLACE}=weights:1", "--json")
        made = json.loads(node.floe(*argv).stdout)
        assert (made["new_layers"], made["saved_bytes"] > SIZE * 0.9) == (2, True)
        assert node.json("model", "show", "weights:1")["manifest"] == made["models"][0]["manifest"]
        daemons = Daemons(tmp_path / "h", {key: node.environ[key] for key in ("FLOE_STORE", "FLOE_INDEX")})
        stack.callback(daemons.close)
        settings = {"snapshotter_address": daemons.address, "snapshotter_root": daemons.root}
        daemon = Containerd(version, tmp_path, registries=(registry.host,), **settings)
        stack.callback(daemon.stop)
        cri = daemon.cri()
        seen = []
        for number, reference in enumerate((source, target)):
            cri.pull(reference)
            container = cri.run_container(cri.run_pod(f"pod-{number}"), reference, ["sleep", "1000"])
            tree = ContainerTree(daemon.pid_of(container))
            facts = {path: linked(fact) for path, fact in tree.facts().items()}
            seen.append([without_marker(facts), without_marker(tree.contents())])
        assert differences(seen[1][0], seen[0][0]) == {}
        assert seen[1][1] == seen[0][1]
        assert len(seen[0][1]) > 7
