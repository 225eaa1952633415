"""Trees mounted through pyfuse3 instead of EROFS: one server a tree, released exactly, replaced when it died."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.mounts import content_of, entry_at, until
from support.trees import TestPack, file_node

from floe.ingest.entries import Node
from floe.mount.mounter import MountState
from floe.mount.mountinfo import read_mounts
from floe.mount.runner import OperationError
from floe.mount.state import METADATA, NATIVE, PACKFS
from floe.snapshotter.idmaps import Clones
from floe.store.errors import BusyError, DamagedError, UnavailableError, UnsupportedError
from floe.store.process import is_alive

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def pid_of(mounter) -> int:
    (record,) = mounter.mounts()
    return int(record.server.partition(".")[0])


@pytest.mark.parametrize("whole", [True, False], ids=["native", "packfs"])
def test_the_same_content_and_released_exactly(node, whole):
    node.serve()
    tree = node.tree(packs=3, complete=whole)
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    for number in range(3):
        assert (where / f"file{number}").read_bytes() == content_of("tree", number, 1 << 20)
    (record,) = mounter.mounts()
    assert (record.mode, record.loops) == (NATIVE if whole else PACKFS, ())
    assert entry_at(where).fstype == "fuse.floe-tree"
    assert Path("/sys/class/bdi", record.bdi, "read_ahead_kb").read_text() == "1024\n"
    assert node.cache.pins(tree.packs[0].id) == (node.pin(tree) if whole else set())
    assert mounter.check(tree.digest) is MountState.HEALTHY
    assert mounter.sweep() == []
    assert is_alive(record.server)
    mounter.release(tree.digest, "a")
    assert not is_alive(record.server)
    assert mounter.mounts() == []
    assert not mounter.state.lingering()
    assert node.cache.pins(tree.packs[0].id) == set()


def test_one_server_for_all_uses(node, tmp_path):
    tree = node.tree()
    mounter, other = node.mounter(kind="portable"), node.mounter(kind="portable")
    mounter.mount(tree, "a")
    other.mount(tree, "b")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        other.bind(tree.digest, tmp_path / name, model=name == "two")
    server = pid_of(mounter)
    assert {"nosuid", "nodev"} <= entry_at(tmp_path / "two").options
    assert not {"nosuid", "nodev"} & entry_at(tmp_path / "one").options
    mounter.release(tree.digest, "a")
    with pytest.raises(BusyError):
        other.release(tree.digest, "b")
    assert (tmp_path / "one" / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert pid_of(mounter) == server
    other.unbind(tmp_path / "one")
    other.unbind(tmp_path / "two")
    other.release(tree.digest, "b")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_an_erofs_mount_that_is_there_is_shared(node):
    tree = node.tree()
    where = node.mounter().mount(tree, "a")
    node.mounter(kind="portable").mount(tree, "b")
    assert entry_at(where).fstype == "erofs"


def test_a_killed_server_is_replaced_and_its_binds_too(node, tmp_path):
    tree = node.tree()
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    shown = tmp_path / "shown"
    shown.mkdir()
    mounter.bind(tree.digest, shown)
    server = mounter.mounts()[0].server
    os.kill(pid_of(mounter), signal.SIGKILL)
    until(lambda: not is_alive(server))
    with pytest.raises(OSError) as caught:
        where.stat()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)  # the second while the kernel still takes it down
    assert mounter.check(tree.digest) is MountState.DEAD
    mounter.mount(tree, "a")
    mounter.bind(tree.digest, shown)
    assert (shown / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert mounter.check(tree.digest) is MountState.HEALTHY
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    mounter.unbind(shown)
    mounter.release(tree.digest, "a")
    assert mounter.sweep() == []
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_mount_whose_maker_died_is_known_again(node):
    tree = node.tree()
    mounter = node.mounter(kind="portable")
    mounter.mount(tree, "a")
    (record,) = mounter.mounts()
    mounter.state.save(replace(record, device="", bdi="", server=""))  # as it is before the mount
    again = node.mounter(kind="portable")
    again.mount(tree, "b")
    (found,) = again.mounts()
    assert (found.server, found.device) == (record.server, record.device)
    again.release(tree.digest, "a")
    again.release(tree.digest, "b")
    assert not is_alive(record.server)


def test_a_server_told_to_end_unmounts_unless_it_is_used(node):
    tree = node.tree()
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    server = mounter.mounts()[0].server
    with (where / "file0").open("rb") as file:
        os.kill(pid_of(mounter), signal.SIGTERM)
        until(lambda: "stays mounted" in mounter.state.portable_log.read_text())
        assert file.read() == content_of("tree", 0, 1 << 20)
    os.kill(pid_of(mounter), signal.SIGTERM)
    until(lambda: not is_alive(server))
    assert entry_at(where) is None
    mounter.release(tree.digest, "a")


def test_a_sweep_ends_what_nobody_owns(node):
    tree = node.tree()
    mounter = node.mounter(kind="portable")
    mounter.mount(tree, "a")
    server = mounter.mounts()[0].server
    mounter.state.remove_owner(tree.digest, "a")
    assert any("unmounted" in line for line in mounter.sweep())
    assert not is_alive(server)
    assert mounter.sweep() == []


def test_a_damaged_image_is_refused_and_nothing_is_left(node):
    tree = node.tree()
    image = bytearray(tree.image.read_bytes())
    image[1024:1028] = b"none"
    tree.image.write_bytes(image)
    mounter = node.mounter(kind="portable")
    with pytest.raises(DamagedError, match="not an EROFS image"):
        mounter.mount(tree, "a")
    assert mounter.mounts() == []
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_tree_without_packs(node):
    tree = node.tree(packs=0)
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    assert mounter.mounts()[0].mode == METADATA
    assert (where / "name").readlink() == Path("tree")
    mounter.release(tree.digest, "a")


def without_erofs(mounter, monkeypatch):
    """What a kernel without EROFS says to this mounter."""
    run = mounter.runner.run

    def refuse(operation, **arguments):
        if operation in ("mount", "probe"):
            raise OperationError(errno.ENODEV, "fsopen erofs", [])
        return run(operation, **arguments)

    monkeypatch.setattr(mounter.runner, "run", refuse)
    return mounter


def test_a_kernel_without_erofs_gets_the_portable_mount(node, monkeypatch):
    tree = node.tree()
    mounter = without_erofs(node.mounter(), monkeypatch)
    where = mounter.mount(tree, "a")
    assert entry_at(where).fstype == "fuse.floe-tree"
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    mounter.release(tree.digest, "a")
    for loop in ("always", "never"):
        strict = without_erofs(node.mounter(kind="erofs", loop=loop), monkeypatch)
        with pytest.raises(UnsupportedError, match="No such device") as error:
            strict.mount(tree, "a")
        assert "mounter" in error.value.hint
    assert not list(node.mounter().state.probes.iterdir()), "a module that is loaded later counts"


def test_without_pyfuse3_the_extra_is_named(node, monkeypatch, tmp_path):
    (tmp_path / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mounter = without_erofs(node.mounter(), monkeypatch)
    with pytest.raises(UnsupportedError, match=r"no EROFS, and load pyfuse3: .*libfuse3") as error:
        mounter.mount(node.tree(), "a")
    assert "pip install '.[portable]'" in error.value.hint


def test_a_lost_packfs_makes_it_dead(node):
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(kind="portable")
    mounter.mount(tree, "a")
    server.kill()
    with pytest.raises((UnavailableError, BusyError)):
        mounter.mount(tree, "b")


def test_a_reader_killed_while_it_waits_is_gone(node):
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    server.hold()
    with subprocess.Popen(["cat", where / "file0"], stdout=subprocess.DEVNULL) as cat:
        until(lambda: server.client.inflight([tree.packs[0].id]))
        cat.kill()
        cat.wait(10)
        assert server.client.inflight([tree.packs[0].id])
    server.go()
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)


def test_direct_io_works_and_holes_show_as_data(node):
    pack = TestPack("p")
    root = Node(stat.S_IFDIR | 0o755, children={b"holes": file_node(pack, bytes(8 << 20) + b"end")})
    mounter = node.mounter(kind="portable")
    where = mounter.mount(node.install(root, [pack]), "a")
    fd = os.open(where / "holes", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 8192) as aligned:
            assert os.preadv(fd, [aligned], 8 << 20) == 3
            assert aligned[:3] == b"end"
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == (8 << 20) + 3
    finally:
        os.close(fd)


def test_it_cannot_be_shown_to_a_user_namespace(node, tmp_path):
    mounter = node.mounter(kind="portable")
    where = mounter.mount(node.tree(), "a")
    with pytest.raises(UnavailableError, match="user namespace") as error:
        Clones(node.run).have([where], tmp_path / "clones", "0:100000:65536", "0:100000:65536")
    assert "portable mount" in error.value.hint
    assert not [entry for entry in read_mounts() if entry.target.startswith(f"{tmp_path}/clones")]


def test_unmounted_with_reads_in_flight_it_ends_at_once(node):
    """By hand: Floe's own commands say busy. The reads have nobody to give their content to."""
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(kind="portable")
    where = mounter.mount(tree, "a")
    name = mounter.mounts()[0].server
    server.hold()
    with subprocess.Popen(["cat", where / "file0"], stdout=subprocess.DEVNULL) as cat:
        until(lambda: server.client.inflight([tree.packs[0].id]))
        cat.kill()
    subprocess.run(["umount", where], check=True)
    until(lambda: not is_alive(name))
    server.go()
    mounter.release(tree.digest, "a")
    assert mounter.sweep() == []
