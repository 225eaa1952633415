"""Trees mounted over the pack filesystem: reads in flight, silent and dead servers, and going native."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.mounts import content_of, entry_at, until

from floe.mount import helper
from floe.mount.mounter import MountState
from floe.mount.state import NATIVE, PACKFS
from floe.mount.syscalls import FsContext, MountSyscallError
from floe.store.errors import BusyError, DeadlineError, UnavailableError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def modes(mounter):
    return [record.mode for record in mounter.mounts()]


def complete(node, tree):
    for pack in tree.packs:
        (node.cache.folder(pack.id) / "complete").touch()


@pytest.fixture
def reading(node):
    """A tree over a server that holds the read of a `cat`: (tree, mounter, server, cat)."""
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(deadline=5)
    where = mounter.mount(tree, "a")
    server.hold()
    with subprocess.Popen(["cat", where / "file0"], stdout=subprocess.PIPE) as cat:
        until(lambda: server.client.inflight([tree.packs[0].id]))
        yield tree, mounter, server, cat
        cat.kill()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGCONT)
            server.go()


def test_a_tree_that_is_not_whole_reads_through_packfs_with_direct_io(node):
    node.serve()
    tree = node.tree(packs=3, complete=False)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    for number in range(3):
        assert (where / f"file{number}").read_bytes() == content_of("tree", number, 1 << 20)
    assert "directio" in entry_at(where).super_options
    (record,) = mounter.mounts()
    assert (record.mode, record.directio) == (PACKFS, True)
    assert [node.cache.pins(pack.id) for pack in tree.packs] == [set()] * 3
    assert mounter.check(tree.digest) is MountState.HEALTHY
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_read_ahead_of_a_tree_over_packfs_is_a_mebibyte(node):
    node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter()
    mounter.mount(tree, "a")
    (record,) = mounter.mounts()
    assert record.mode == PACKFS
    assert Path("/sys/class/bdi", record.bdi, "read_ahead_kb").read_text() == "1024\n"


def test_a_kernel_without_directio_mounts_without_it(node, monkeypatch):
    tree = node.tree()
    flag = FsContext.flag

    def refuse(self, key):
        if key == "directio":
            raise MountSyscallError(errno.EINVAL, "option directio", ["erofs: Unknown parameter 'directio'"])
        flag(self, key)

    monkeypatch.setattr(FsContext, "flag", refuse)
    target = node.run / "by hand"
    target.mkdir()
    answer = helper.mount_tree(str(tree.image), [str(tree.packs[0].data)], str(target), directio=True)
    assert answer["directio"] is False
    assert (target / "file0").read_bytes() == content_of("tree", 0, 1 << 20)


def test_without_packfs_the_hint_says_what_to_start(node):
    tree = node.tree(complete=False)
    mounter = node.mounter()
    with pytest.raises(UnavailableError, match=tree.digest) as error:
        mounter.mount(tree, "a")
    assert "floe packfs" in error.value.hint
    assert mounter.uses(tree.digest) == set()
    assert list((node.run / "trees").iterdir()) == []


def test_an_unmount_with_a_read_in_flight_neither_hangs_nor_blocks_the_node(node, reading):
    tree, mounter, server, cat = reading
    cat.kill()
    cat.wait(20)  # the read goes on without its reader, so that no open file makes umount refuse
    start = time.monotonic()
    with pytest.raises(BusyError, match=r"\d reads in flight"):
        mounter.release(tree.digest, "a")
    assert time.monotonic() - start < 8  # the deadline is ten
    other = node.tree("other")
    mounter.mount(other, "b")
    mounter.release(other.digest, "b")
    (mounter.target(tree.digest) / "file0").stat()
    server.go()
    until(lambda: not server.client.inflight([tree.packs[0].id]))
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_a_killed_reader_of_a_tree_s_mapped_file_is_gone_though_no_worker_runs(node):
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(deadline=5)
    where = mounter.mount(tree, "a")
    server.hold()
    code = "import mmap,os,sys; mmap.mmap(os.open(sys.argv[1], 0), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)[9]"
    with subprocess.Popen([sys.executable, "-c", code, where / "file0"]) as reader:
        until(lambda: server.client.inflight([tree.packs[0].id]))
        server.silence()
        reader.kill()
        assert reader.wait(20) == -signal.SIGKILL
    server.process.send_signal(signal.SIGCONT)
    server.go()
    until(lambda: not server.client.inflight([tree.packs[0].id]))
    mounter.release(tree.digest, "a")


def test_reads_in_flight_on_other_packs_do_not_matter(node, reading):
    _, mounter, server, _ = reading
    server.go()
    other = node.tree("other", complete=False)
    mounter.mount(other, "b")
    server.hold()
    mounter.release(other.digest, "b")
    assert mounter.check(other.digest) is MountState.MISSING


def test_a_silent_packfs_with_reads_is_busy_and_without_is_not(node, reading):
    tree, mounter, server, cat = reading
    mounter.packfs._timeout = 0.2
    server.silence()
    cat.kill()
    with pytest.raises(BusyError, match="does not answer"):
        mounter.release(tree.digest, "a")
    server.process.send_signal(signal.SIGCONT)
    server.go()
    until(lambda: not server.client.inflight([tree.packs[0].id]))
    server.silence()
    mounter.release(tree.digest, "a")
    assert not mounter.target(tree.digest).exists()


def test_checking_above_a_silent_packfs_ends_at_the_deadline(node):
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter(deadline=0.5)
    mounter.mount(tree, "a")
    server.silence()
    with pytest.raises(DeadlineError):
        mounter.check(tree.digest)
    server.process.send_signal(signal.SIGCONT)
    until(lambda: not mounter.stuck())
    assert mounter.check(tree.digest) is MountState.HEALTHY


def test_a_dead_packfs_is_noticed_and_its_trees_can_go(node, reading):
    tree, mounter, server, cat = reading
    server.kill()
    assert cat.wait(5) != 0  # the read ended with an error, at once
    assert mounter.check(tree.digest) is MountState.DEAD
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING


def test_a_dead_tree_is_mounted_anew_and_its_binds_replaced(node, tmp_path):
    server = node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    target = tmp_path / "bound"
    target.mkdir()
    mounter.bind(tree.digest, target)
    server.kill()
    node.serve()
    assert mounter.check(tree.digest) is MountState.DEAD  # a new server does not heal it
    with pytest.raises(OSError, match="Input/output error"):
        (target / "file0").read_bytes()
    mounter.mount(tree, "a")
    assert mounter.check(tree.digest) is MountState.HEALTHY
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert entry_at(target).device != entry_at(where).device
    mounter.bind(tree.digest, target)
    assert entry_at(target).device == entry_at(where).device
    assert (target / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    mounter.unbind(target)
    mounter.release(tree.digest, "a")


def test_a_tree_goes_native_only_when_nothing_uses_it(node, tmp_path):
    node.serve()
    tree = node.tree(complete=False)
    mounter = node.mounter()
    mounter.mount(tree, "a")
    target = tmp_path / "bound"
    target.mkdir()
    mounter.bind(tree.digest, target)
    complete(node, tree)
    mounter.mount(tree, "b")
    assert modes(mounter) == [PACKFS]
    for owner in ("a", "b"):
        mounter.state.remove_owner(tree.digest, owner)
    mounter.mount(tree, "c")  # no other owner, but a bind
    assert modes(mounter) == [PACKFS]
    mounter.unbind(target)
    mounter.state.remove_owner(tree.digest, "c")
    where = mounter.mount(tree, "d")
    assert modes(mounter) == [NATIVE]
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
