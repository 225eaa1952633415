"""Trees mounted straight on the cache's files: one superblock, owners, pins, binds."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.mounts import content_of, entry_at, mount_node

from floe.mount.mounter import MountState
from floe.mount.mountinfo import read_mounts
from floe.mount.state import METADATA, NATIVE, PACKFS
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import (
    BadInputError,
    BusyError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def pins(node, tree):
    return [node.cache.pins(pack.id) for pack in tree.packs]


def test_a_whole_tree_mounts_on_its_files_and_reads_back(node):
    tree = node.tree(packs=2, size=5 << 20)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    assert where == node.run / "trees" / tree.digest
    for number in range(2):
        assert (where / f"file{number}").read_bytes() == content_of("tree", number, 5 << 20)
    (record,) = mounter.mounts()
    assert (record.mode, record.loops, record.directio) == (NATIVE, (), False)
    assert pins(node, tree) == [node.pin(tree)] * 2
    assert mounter.check(tree.digest) is MountState.HEALTHY
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING
    assert pins(node, tree) == [set(), set()]
    assert mounter.mounts() == []
    assert not where.exists()


def test_layers_keep_setuid_and_devices_and_models_do_not(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    layer, model = tmp_path / "layer", tmp_path / "model"
    for target, is_model in ((layer, False), (model, True)):
        target.mkdir()
        mounter.bind(tree.digest, target, model=is_model)
    assert {"ro", "relatime"} == entry_at(layer).options
    assert {"ro", "nosuid", "nodev", "relatime"} == entry_at(model).options
    assert (layer / "null").read_bytes() == b""
    with pytest.raises(PermissionError):
        (model / "null").read_bytes()
    for place in (where, layer):
        with pytest.raises(OSError, match="Read-only") as error:
            (place / "new").touch()
        assert error.value.errno == errno.EROFS
    assert len({entry_at(place).device for place in (where, layer, model)}) == 1


def test_two_owners_in_two_processes_share_one_superblock(node):
    tree = node.tree()
    first, second = node.mounter(), node.mounter()
    first.mount(tree, "a")
    device = (node.run / "trees" / tree.digest).stat().st_dev
    second.mount(tree, "b")
    assert (node.run / "trees" / tree.digest).stat().st_dev == device
    assert sum(entry.fstype == "erofs" and entry.target.startswith(str(node.root)) for entry in read_mounts()) == 1
    assert first.uses(tree.digest) == {"a", "b"}
    first.release(tree.digest, "a")
    assert second.check(tree.digest) is MountState.HEALTHY
    second.release(tree.digest, "a")  # not an owner any more: nothing happens
    assert second.check(tree.digest) is MountState.HEALTHY
    second.release(tree.digest, "b")
    assert second.check(tree.digest) is MountState.MISSING


def test_read_ahead_is_a_mebibyte(node):
    tree = node.tree()
    mounter = node.mounter()
    mounter.mount(tree, "a")
    (record,) = mounter.mounts()
    assert Path("/sys/class/bdi", record.bdi, "read_ahead_kb").read_text() == "1024\n"


def test_trees_are_a_private_mount(node):
    subprocess.run(["mount", "--bind", node.run, node.run], check=True)
    subprocess.run(["mount", "--make-shared", node.run], check=True)
    mounter = node.mounter()
    where = mounter.mount(node.tree(), "a")
    assert not entry_at(node.run / "trees").shared
    assert not entry_at(where).shared
    mounter.release(where.name, "a")
    subprocess.run(["umount", node.run / "trees", node.run], check=True)


def test_pins_are_durable_before_the_mount_and_stay_until_it_is_gone(node, monkeypatch):
    tree = node.tree(packs=3)
    mounter = node.mounter()
    seen = {}
    run = mounter.runner.run

    def watch(operation, **arguments):
        if operation in {"mount", "umount"}:
            seen[operation] = pins(node, tree)
        return run(operation, **arguments)

    monkeypatch.setattr(mounter.runner, "run", watch)
    mounter.mount(tree, "a")
    mounter.release(tree.digest, "a")
    assert seen == dict.fromkeys(("mount", "umount"), [node.pin(tree)] * 3)
    assert pins(node, tree) == [set()] * 3


def test_a_pack_that_is_evicted_before_its_pin_is_not_mounted_natively(node, monkeypatch):
    tree = node.tree(packs=2)
    evicted = node.cache.folder(tree.packs[1].id) / "complete"
    pin = node.cache.pin

    def late(pack_id, owner):
        evicted.unlink(missing_ok=True)
        pin(pack_id, owner)

    monkeypatch.setattr(node.cache, "pin", late)
    with pytest.raises(UnavailableError) as error:
        node.mounter().mount(tree, "a")
    assert "floe packfs" in error.value.hint
    assert pins(node, tree) == [set(), set()]


def test_a_whole_tree_on_a_disk_that_turned_read_only_comes_through_the_pack_filesystem(node, tmp_path, caplog):
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", home], check=True)
    node.cache = NodeCache(home)
    tree = node.tree(packs=2)
    node.serve()
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    assert mounter.mounts()[0].mode == PACKFS
    assert (where / "file1").read_bytes() == content_of("tree", 1, 1 << 20)
    assert "cannot be pinned" in caplog.text
    mounter.release(tree.digest, "a")


def test_a_pin_that_the_disk_has_no_room_for_leaves_none(node, monkeypatch):
    tree = node.tree(packs=3)
    node.serve()
    mounter = node.mounter()
    pin = node.cache.pin

    def full(pack_id, owner):
        if pack_id == tree.packs[1].id:
            raise NoSpaceError("the disk is full")
        pin(pack_id, owner)

    monkeypatch.setattr(node.cache, "pin", full)
    mounter.mount(tree, "a")
    assert mounter.mounts()[0].mode == PACKFS
    assert pins(node, tree) == [set()] * 3


def test_pins_that_cannot_be_read_end_neither_a_mount_nor_a_sweep(node, monkeypatch):
    tree = node.tree(packs=1)

    def failing(_pack_id):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(node.cache, "pins", failing)
    mounter = node.mounter()
    with pytest.raises(UnavailableError) as error:  # it is for the pack filesystem
        mounter.mount(tree, "a")
    assert "floe packfs" in error.value.hint
    assert any("the cache cannot be read" in said for said in mounter.sweep())


def test_a_pack_file_of_the_wrong_size_is_not_mounted(node, monkeypatch):
    tree = node.tree()
    os.truncate(tree.packs[0].data, 4096)
    monkeypatch.setattr(node.cache, "is_complete", lambda _pack: True)
    with pytest.raises(UnavailableError):
        node.mounter().mount(tree, "a")
    assert pins(node, tree) == [set()]


def test_a_device_that_shrinks_gives_eio_not_zeros(node):
    tree = node.tree(size=4 << 20)
    where = node.mounter().mount(tree, "a")
    os.truncate(tree.packs[0].data, 2 << 20)
    with (where / "file0").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError) as error:
            os.pread(file.fileno(), 4096, 3 << 20)
    assert error.value.errno == errno.EIO


def test_a_worker_that_finds_a_device_cut_leaves_it_so(node):
    tree = node.tree(size=4 << 20)
    where = node.mounter().mount(tree, "a")
    os.truncate(tree.packs[0].data, 2 << 20)
    with closing(CacheWriter(node.cache)) as writer:
        assert writer.pack(tree.packs[0].id) is None
    with (where / "file0").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 4096, 1 << 20) == content_of("tree", 0, 4 << 20)[1 << 20 :][:4096]
        with pytest.raises(OSError) as error:
            os.pread(file.fileno(), 4096, 3 << 20)
    assert error.value.errno == errno.EIO


def test_a_tree_without_packs_mounts_alone(node):
    tree = node.tree("only names", packs=0)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    assert (where / "name").readlink() == Path("only names")
    assert [record.mode for record in mounter.mounts()] == [METADATA]
    mounter.release(tree.digest, "a")


def test_two_hundred_packs(node):
    tree = node.tree(packs=200, size=8192)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    for number in (0, 100, 199):
        assert (where / f"file{number}").read_bytes() == content_of("tree", number, 8192)
    mounter.release(tree.digest, "a")


def test_paths_longer_than_fsconfig_takes(tmp_path):
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    with mount_node(deep) as node:
        tree = node.tree(size=4096)
        where = node.mounter().mount(tree, "a")
        assert (where / "file0").read_bytes() == content_of("tree", 0, 4096)


def test_a_mount_and_its_owners_outlive_kill_9(node):
    tree = node.tree()
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from support.mounts import NoStore\nfrom floe.store.cache import NodeCache\n"
        "from floe.store.trees import TreeStore\nfrom floe.mount.mounter import TreeMounter\n"
        "cache = NodeCache(Path(sys.argv[3]))\ntree = TreeStore(NoStore(), cache).fetch_local(sys.argv[4])\n"
        "TreeMounter(Path(sys.argv[2]), cache).mount(tree, 'snapshot/1 ä')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, tests, node.run, node.cache.root, tree.digest], check=False, cwd=tests.parent
    )
    assert done.returncode == -signal.SIGKILL
    mounter = node.mounter()
    assert mounter.uses(tree.digest) == {"snapshot/1 ä"}
    assert mounter.check(tree.digest) is MountState.HEALTHY
    assert pins(node, tree) == [node.pin(tree)]
    assert mounter.sweep() == []
    mounter.release(tree.digest, "snapshot/1 ä")
    assert mounter.check(tree.digest) is MountState.MISSING
    assert pins(node, tree) == [set()]


def test_owners_of_another_boot_count_for_nothing(node):
    tree = node.tree()
    mounter = node.mounter()
    mounter.mount(tree, "a")
    (file,) = (node.run / "owners" / tree.digest).iterdir()
    file.write_text(json.dumps({"owner": "a", "boot": "another"}))
    assert mounter.uses(tree.digest) == set()
    assert any("unmounted" in line for line in mounter.sweep())
    assert mounter.check(tree.digest) is MountState.MISSING


def test_a_bound_tree_is_not_unmounted(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter()
    mounter.mount(tree, "a")
    target = tmp_path / "bound"
    target.mkdir()
    mounter.bind(tree.digest, target)
    mounter.bind(tree.digest, target)  # there already
    with pytest.raises(BusyError, match=str(target)):
        mounter.release(tree.digest, "a")
    assert mounter.uses(tree.digest) == set()
    assert mounter.check(tree.digest) is MountState.HEALTHY
    mounter.unbind(target)
    mounter.unbind(target)  # nothing there: nothing happens
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_an_open_file_keeps_a_tree_and_its_holder_is_named(node):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    with (where / "file0").open("rb"), pytest.raises(BusyError) as error:
        mounter.release(tree.digest, "a")
    assert f"(pid {os.getpid()})" in error.value.hint
    assert pins(node, tree) == [node.pin(tree)]
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_what_cannot_be_bound_is_refused(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter()
    target = tmp_path / "bound"
    target.mkdir()
    with pytest.raises(PreconditionError):
        mounter.bind(tree.digest, target)
    mounter.mount(tree, "a")
    with pytest.raises(NotFoundError):
        mounter.bind(tree.digest, tmp_path / "missing")
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    try:
        with pytest.raises(BusyError, match="tmpfs"):
            mounter.bind(tree.digest, target)
        with pytest.raises(PreconditionError, match="tmpfs"):
            mounter.unbind(target)
    finally:
        subprocess.run(["umount", target], check=True)
    with pytest.raises(BadInputError):
        mounter.release("../x", "a")


def test_a_mount_that_fails_leaves_nothing(node, monkeypatch):
    tree = node.tree()
    damaged = bytearray(tree.image.read_bytes())
    damaged[1024:1028] = b"none"
    tree.image.write_bytes(damaged)
    mounter = node.mounter()
    with pytest.raises(Exception, match="superblock") as error:
        mounter.mount(tree, "a")
    assert error.value.hint
    assert list((node.run / "trees").iterdir()) == []
    assert mounter.uses(tree.digest) == set()
    assert mounter.mounts() == []
    assert pins(node, tree) == [set()]


def test_a_pin_stays_while_an_overlay_still_uses_the_tree(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={where},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "none", "-o", options, tmp_path / "merged"], check=True)
    try:
        mounter.release(tree.digest, "a")
        assert pins(node, tree) == [node.pin(tree)]
        mounter.sweep()
        assert pins(node, tree) == [node.pin(tree)]
        assert (tmp_path / "merged/file0").read_bytes() == content_of("tree", 0, 1 << 20)
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)
    assert any("unpinned" in line for line in mounter.sweep())
    assert pins(node, tree) == [set()]


def test_a_tree_unmounted_by_hand_comes_back_with_its_superblock(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    device = where.stat().st_dev
    target = tmp_path / "bound"
    target.mkdir()
    mounter.bind(tree.digest, target)
    subprocess.run(["umount", where], check=True)
    assert mounter.check(tree.digest) is MountState.MISSING
    mounter.mount(tree, "b")
    assert where.stat().st_dev == target.stat().st_dev == device
