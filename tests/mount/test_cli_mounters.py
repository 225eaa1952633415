"""`floe model mount` by root on loop devices and portably, as settings and flags ask for it."""

from __future__ import annotations

import os

import pytest
from support.floe_node import Node, wait_until
from support.mounts import entry_at

from floe.mount.loop import attached_loops

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(5 << 20))
    made.floe("model", "push", folder, "m")
    yield made
    made.clean_up()


def check(node, by, mode, *flags):
    target = node.home / "mnt"
    node.floe("model", "mount", *flags, "m", target)
    try:
        (mount,) = node.json("status")["mounts"]
        assert (mount["by"], mount["mode"]) == (by, mode)
        assert entry_at(target).fstype == ("fuse.floe-tree" if by == "portable" else "erofs")
        assert {"ro", "nosuid", "nodev"} <= entry_at(target).options
        assert (target / "weights").read_bytes() == (node.home / "m" / "weights").read_bytes()
        text = node.floe("status").stdout
        assert f"({mode}{', portable' if by == 'portable' else ''})" in text
        yield
    finally:
        node.floe("umount", target)
    wait_until(lambda: not node.processes())
    assert node.mounts() == []


@pytest.mark.slow
def test_portable_over_the_pack_filesystem_then_over_the_cache_alone(node):
    list(check(node, "portable", "packfs", "--portable"))
    list(check(node, "portable", "native", "--mounter=portable"))
    list(check(node, "erofs", "native"))


@pytest.mark.slow
def test_loop_devices_by_flag_and_by_setting(node):
    def loops():
        return [file for file in attached_loops().values() if file.startswith(str(node.home))]

    for _ in check(node, "erofs", "packfs", "--loop=always"):
        assert len(loops()) == 2
    assert loops() == []
    node.environ["FLOE_LOOP"] = "always"
    for _ in check(node, "erofs", "native"):
        assert len(loops()) == 2
    for _ in check(node, "erofs", "native", "--loop", "never"):
        assert loops() == []
    assert loops() == []


def test_other_words_are_refused_before_anything_changes(node):
    for flag in ("--loop=sometimes", "--mounter=fuse"):
        refused = node.floe("model", "mount", flag, "m", node.home / "mnt", code=2)
        assert flag.partition("=")[0] in refused.stderr
    assert not (node.home / "mnt").exists()
    assert not node.run_dir.exists()
