"""Loop devices below EROFS: forced, on disks that need them, on kernels that need them, and always released."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from support.mounts import content_of, entry_at

from floe.mount.loop import attached_loops
from floe.mount.probe import probe, probe_image
from floe.mount.state import NATIVE, PACKFS
from floe.store.cache import NodeCache
from floe.store.erofs import parse_superblock
from floe.store.errors import DamagedError, UnsupportedError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def loops_below(node):
    return {device for device, file in attached_loops().items() if file.startswith(str(node.root))}


@pytest.mark.parametrize("whole", [True, False], ids=["native", "packfs"])
def test_forced_loops_show_the_same_content_and_are_released(node, whole):
    node.serve()
    tree = node.tree(packs=3, complete=whole)
    mounter = node.mounter(loop="always")
    where = mounter.mount(tree, "a")
    for number in range(3):
        assert (where / f"file{number}").read_bytes() == content_of("tree", number, 1 << 20)
    (record,) = mounter.mounts()
    assert record.mode == (NATIVE if whole else PACKFS)
    assert {device for device, _ in record.loops} == loops_below(node)
    assert len(record.loops) == 4
    assert entry_at(where).device.startswith("7:")
    assert Path("/sys/class/bdi", record.bdi, "read_ahead_kb").read_text() == "1024\n"
    for device, _ in record.loops:
        assert Path("/sys/block", Path(device).name, "ro").read_text() == "1\n"
    assert mounter.sweep() == []
    mounter.release(tree.digest, "a")
    assert loops_below(node) == set()
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_mount_that_fails_releases_its_loops(node):
    tree = node.tree(packs=2)
    image = bytearray(tree.image.read_bytes())
    image[1024:1028] = b"none"
    tree.image.write_bytes(image)
    with pytest.raises(DamagedError):
        node.mounter(loop="always").mount(tree, "a")
    assert loops_below(node) == set()


def test_a_truncated_loop_device_gives_eio(node):
    tree = node.tree(size=4 << 20)
    os.truncate(tree.packs[0].data, 2 << 20)
    node.cache.is_complete = lambda _pack: True
    tree = type(tree)(
        tree.digest, tree.image, (type(tree.packs[0])(tree.packs[0].id, 2 << 20, tree.packs[0].data, True),)
    )
    try:
        where = node.mounter(loop="always").mount(tree, "a")
    except DamagedError:
        return  # refused at once, which is as good
    with (where / "file0").open("rb") as file, pytest.raises(OSError) as error:
        os.pread(file.fileno(), 4096, 3 << 20)
    assert error.value.errno == errno.EIO


@pytest.fixture(params=["tmpfs", "overlay"])
def odd_cache(node, tmp_path, request):
    """A cache on a disk from which EROFS does not mount."""
    home = tmp_path / "home"
    home.mkdir()
    if request.param == "tmpfs":
        arguments = ["-t", "tmpfs", "none"]
    else:
        for name in ("lower", "upper", "work"):
            (tmp_path / name).mkdir()
        options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
        arguments = ["-t", "overlay", "none", "-o", options]
    subprocess.run(["mount", *arguments, home], check=True)
    return NodeCache(home)


def test_a_cache_on_tmpfs_or_overlay_falls_to_loops(node, odd_cache):
    tree = node.tree(packs=2, cache=odd_cache)
    mounter = node.mounter(cache=odd_cache)
    where = mounter.mount(tree, "a")
    assert (where / "file1").read_bytes() == content_of("tree", 1, 1 << 20)
    (record,) = mounter.mounts()
    assert len(record.loops) == 3
    mounter.release(tree.digest, "a")
    assert loops_below(node) == set()
    with pytest.raises(UnsupportedError) as error:
        node.mounter(cache=odd_cache, loop="never").mount(tree, "a")
    assert "local disk" in error.value.hint


def test_enotblk_falls_to_loops_even_after_a_good_probe(node, odd_cache):
    tree = node.tree(cache=odd_cache)
    mounter = node.mounter(cache=odd_cache)
    mounter.placement._folders = node.cache.roots  # the probe looks at a good disk
    where = mounter.mount(tree, "a")
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert len(mounter.mounts()[0].loops) == 2


def test_this_kernel_passes_the_probe_once_a_boot(node, monkeypatch):
    mounter = node.mounter()
    assert mounter.placement.probe().files
    assert not [path for path in node.cache.root.iterdir() if path.name.startswith("probe")]
    again = node.mounter()
    monkeypatch.setattr(again.runner, "run", lambda *_, **__: pytest.fail("asked again"))
    assert again.placement.probe().files


@pytest.fixture
def read_only(tmp_path):
    """The folder of a disk that turned read-only."""
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_one_of_several_disks_that_cannot_be_tried_keeps_no_tree_from_being_mounted(node, read_only):
    mounter = node.mounter()
    mounter.placement._folders = (read_only, *node.cache.roots)
    mounter.mount(node.tree(), "a")
    assert mounter.mounts()[0].loops == ()


def test_where_nothing_can_be_tried_trees_are_mounted_from_loops_until_it_can(node, read_only):
    mounter = node.mounter()
    mounter.placement._folders = (read_only,)
    mounter.mount(node.tree(), "a")
    assert len(mounter.mounts()[0].loops) == 2
    refusing = node.mounter(loop="never")
    refusing.placement._folders = (read_only,)
    with pytest.raises(UnsupportedError, match=r"cannot be tried: .*Read-only file system"):
        refusing.mount(node.tree("other"), "a")
    mounter.placement._folders = node.cache.roots
    assert mounter.placement.probe().files


@pytest.mark.parametrize("answer", [{"read": 32768, "errno": 0}, {"read": 32768, "errno": errno.EIO}])
def test_a_kernel_that_fills_with_zeros_gets_loops(node, monkeypatch, answer):
    mounter = node.mounter()
    run = mounter.runner.run
    monkeypatch.setattr(
        mounter.runner,
        "run",
        lambda operation, **arguments: answer if operation == "probe" else run(operation, **arguments),
    )
    tree = node.tree()
    mounter.mount(tree, "a")
    assert len(mounter.mounts()[0].loops) == 2
    refusing = node.mounter(loop="never")  # remembers what the probe said
    with pytest.raises(UnsupportedError, match="zeros"):
        refusing.mount(node.tree("other"), "a")


def test_the_probe_tree_is_a_good_one(node, tmp_path):
    (tmp_path / "image").write_bytes(probe_image())
    pack = tmp_path / "pack"
    pack.write_bytes(b"\xa5" * 32768)
    assert parse_superblock(probe_image(), 4096, "probe tree").devices == 1
    mounter = node.mounter()
    request = {"source": str(tmp_path / "image"), "devices": [str(pack)], "name": "probe", "length": 32768}
    assert mounter.runner.run("probe", **request) == {"read": 32768, "errno": 0}
    assert probe(mounter.runner, tmp_path).files


def test_a_sweep_detaches_loop_devices_on_our_files_without_a_mount(node):
    tree = node.tree()
    device = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", tree.packs[0].data], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert loops_below(node) == {device}
    said = node.mounter().sweep()
    assert loops_below(node) == set()
    assert any(device in line for line in said)
