"""Deadlines of mount processes, and clearing up after those that died."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.mounts import content_of, until

from floe.mount.modelmount import mount_model, umount_model
from floe.mount.mounter import MountState, TreeMounter
from floe.mount.mountinfo import read_mounts
from floe.mount.runner import MountRunner, OperationError
from floe.mount.state import NATIVE, MountRecord
from floe.mount.syscalls import unmount
from floe.store.errors import BusyError, DeadlineError, UnavailableError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

HUNG = (sys.executable, "-S", "-c", "import signal; signal.pause()")


def test_a_mount_process_that_hangs_is_given_up_at_the_deadline(node):
    tree = node.tree()
    node.mounter().placement.probe()
    hung = node.mounter(deadline=0.3, command=HUNG)
    node.mounter().home.ensure()
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"mount .* did not end within 0.3 s; it was ended") as error:
        hung.mount(tree, "a")
    assert time.monotonic() - start < 8
    assert error.value.hint
    assert hung.stuck() == {}
    assert hung.uses(tree.digest) == set()
    assert node.cache.pins(tree.packs[0].id) == set()
    mounter = node.mounter()
    where = mounter.mount(tree, "b")  # no lock is left behind
    with pytest.raises(DeadlineError):
        hung.release(tree.digest, "b")
    assert (where / "file0").exists()
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    assert any("unmounted" in line for line in mounter.sweep())
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_process_the_kernel_does_not_let_go_is_left_behind_and_reported(node):
    server = node.serve()
    tree = node.tree(packs=2, complete=True)
    node.mounter().placement.probe()
    # Reading a file of a server that keeps the request cannot be interrupted, not even by SIGKILL.
    stuck = node.mounter(deadline=0.3, command=("cat", str(node.run / "packs" / tree.packs[1].id)))
    node.mounter().home.ensure()
    server.hold()
    start = time.monotonic()
    with pytest.raises(DeadlineError, match="hangs in the kernel") as error:
        stuck.mount(tree, "a")
    assert time.monotonic() - start < 8
    other = node.mounter()  # as another process would, for `floe status`
    ((pid, what),) = other.stuck().items()
    assert str(pid) in str(error.value)
    assert tree.digest in what
    # It may still mount: so its pins stay, and a sweep leaves them alone.
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    other.sweep()
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    another = node.tree("another")
    where = other.mount(another, "b")
    assert (where / "file0").read_bytes() == content_of("another", 0, 1 << 20)
    server.go()
    until(lambda: not other.stuck() and not stuck.stuck())
    assert any("forgotten" in line for line in other.sweep())
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_mount_process_that_dies_is_an_error_not_a_mount(node):
    runner = MountRunner(5, node.run, (sys.executable, "-c", "import sys; sys.exit('no such luck')"))
    with pytest.raises(UnavailableError, match="status 1: no such luck"):
        runner.run("mount", target="/x")
    with pytest.raises(OperationError, match="umount /does/not/exist: No such file"):
        node.mounter().runner.run("umount", target="/does/not/exist")


def test_a_tree_being_worked_on_elsewhere_is_busy_after_a_while(node):
    tree = node.tree()
    mounter = node.mounter(deadline=1.0)
    with node.mounter().locked(tree.digest), pytest.raises(BusyError, match="another process"):
        mounter.mount(tree, "a")


def test_a_sweep_unmounts_what_nobody_owns_and_keeps_the_rest(node):
    kept, lost = node.tree("kept"), node.tree("lost")
    mounter = node.mounter()
    for tree in (kept, lost):
        mounter.mount(tree, "a")
    mounter.state.remove_owner(lost.digest, "a")
    (said,) = node.mounter().sweep()
    assert lost.digest in said
    assert mounter.check(lost.digest) is MountState.MISSING
    assert mounter.check(kept.digest) is MountState.HEALTHY
    assert node.cache.pins(lost.packs[0].id) == set()
    assert node.cache.pins(kept.packs[0].id) == node.pin(kept)


def test_a_sweep_leaves_a_busy_tree_and_says_so(node):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    mounter.state.remove_owner(tree.digest, "a")
    with (where / "file0").open("rb"):
        (said,) = mounter.sweep()
    assert f"tree {tree.digest} stays" in said
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    mounter.sweep()
    assert mounter.check(tree.digest) is MountState.MISSING


def test_a_sweep_removes_pins_and_records_without_a_mount(node):
    tree, other = node.tree(), node.tree("other")
    mounter = node.mounter()
    node.cache.pin(tree.packs[0].id, *node.pin(tree))  # its mounter died before the mount
    node.cache.pin(other.packs[0].id, *node.pin(other))
    node.cache.pin(other.packs[0].id, "warm-up")
    mounter.state.save(MountRecord(other.digest, NATIVE, (other.packs[0].id,), mounter.state.boot))
    assert len(mounter.sweep()) == 2
    assert node.cache.pins(tree.packs[0].id) == set()
    assert node.cache.pins(other.packs[0].id) == {"warm-up"}
    assert mounter.mounts() == []
    assert mounter.sweep() == []


def test_a_mount_whose_mounter_died_before_the_last_word_is_taken_up(node):
    tree = node.tree()
    mounter = node.mounter()
    where = mounter.mount(tree, "a")
    (record,) = mounter.mounts()
    mounter.state.save(replace(record, device="", bdi=""))
    node.mounter().mount(tree, "b")
    assert mounter.mounts() == [record]
    assert (where / "file0").exists()
    for owner in ("a", "b"):
        mounter.release(tree.digest, owner)
    assert node.cache.pins(tree.packs[0].id) == set()


def test_a_pid_that_was_used_again_is_not_reported_as_stuck(node):
    mounter = node.mounter()
    Path(mounter.state.stuck, f"{os.getpid()}.json").write_text(json.dumps({"what": "mount x", "started": 1}))
    assert mounter.stuck() == {}
    assert list(mounter.state.stuck.iterdir()) == []


def test_ctrl_c_for_the_caller_does_not_reach_a_mount_process(node):
    program = "import json, os; print(json.dumps({'session': os.getsid(0)}))"
    runner = MountRunner(5, node.run, (sys.executable, "-c", program))
    assert runner.run("x")["session"] != os.getsid(0)  # the terminal sends SIGINT to one process group of its session


def test_two_run_directories_on_one_cache_keep_each_others_pins(node, tmp_path):
    tree = node.tree()
    first, second = node.mounter(), TreeMounter(tmp_path / "run 2", node.cache)
    first.mount(tree, "a")
    where = second.mount(tree, "a")
    first.release(tree.digest, "a")
    first.sweep()
    assert node.cache.pins(tree.packs[0].id) == {second.pins.owner(tree.digest)}
    assert (where / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    second.release(tree.digest, "a")
    assert node.cache.pins(tree.packs[0].id) == set()


@pytest.mark.slow
def test_many_users_at_once_share_one_mount_and_leave_nothing(node):
    tree = node.tree()
    mounters = [node.mounter(), node.mounter()]

    def use(number):
        mounter = mounters[number % 2]
        where = mounter.mount(tree, f"user {number}")
        device = where.stat().st_dev
        assert (where / "file0").stat().st_size == 1 << 20
        mounter.release(tree.digest, f"user {number}")
        return device

    mounters[0].mount(tree, "first")
    device = mounters[0].target(tree.digest).stat().st_dev
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(24))) == {device}
    mounters[0].release(tree.digest, "first")
    with ThreadPoolExecutor(8) as pool:  # and now each may be the first or the last
        assert len(list(pool.map(use, range(24)))) == 24
    assert mounters[0].check(tree.digest) is MountState.MISSING
    assert node.cache.pins(tree.packs[0].id) == set()
    assert mounters[0].mounts() == []


def reboot(node):
    """No mounts, and nothing in the run directory; the cache with its pins is on disk."""
    for entry in reversed(read_mounts()):
        if entry.target.startswith(f"{node.run}/"):
            unmount(entry.target)
    shutil.rmtree(node.run)
    node.run.mkdir()
    return node.mounter()


def test_a_release_after_a_reboot_drops_the_pins(node):
    tree, kept = node.tree(), node.tree("kept")
    mounter = node.mounter()
    mounter.mount(tree, "a")
    mounter.mount(kept, "a")
    assert node.cache.pins(tree.packs[0].id) == node.pin(tree)
    mounter = reboot(node)
    mounter.release(tree.digest, "a")
    assert node.cache.pins(tree.packs[0].id) == set()
    assert node.cache.pins(kept.packs[0].id) == node.pin(kept)
    mounter.mount(kept, "a")
    mounter.release(kept.digest, "a")
    assert node.cache.pins(kept.packs[0].id) == set()


def test_a_release_whose_record_was_lost_drops_the_pins(node):
    tree = node.tree()
    mounter = node.mounter()
    mounter.mount(tree, "a")
    mounter.state.forget(tree.digest)
    node.serve()  # without its record the mount is taken to need the pack filesystem
    mounter.release(tree.digest, "a")
    assert mounter.check(tree.digest) is MountState.MISSING
    assert node.cache.pins(tree.packs[0].id) == set()


def test_mounting_a_model_drops_the_pins_of_models_before_the_reboot(node, tmp_path):
    old, new = node.tree("old"), node.tree("new")

    def mount(tree, mounter, place):
        mount_model(tree, place, mounter, model="m", start_packfs=pytest.fail, stop_packfs=pytest.fail)

    mount(old, node.mounter(), tmp_path / "old")
    unmount(str(tmp_path / "old"))
    mounter = reboot(node)
    mount(new, mounter, tmp_path / "new")
    assert node.cache.pins(old.packs[0].id) == set()
    assert node.cache.pins(new.packs[0].id) == node.pin(new)
    umount_model(tmp_path / "new", mounter, stop_packfs=pytest.fail)


def test_temporaries_of_killed_writers_go_and_those_of_living_ones_stay(node):
    mounter, spare = node.mounter(), node.cache.spare
    mounter.sweep()
    code = "import os, signal, sys; from pathlib import Path; from floe.store.cache import durable\n"
    code += "real = os.fsync\ndef first(fd):\n    os.fsync = real\n    os.kill(os.getpid(), signal.SIG{})\nos.fsync = first\n"
    code += "durable.write_durably(Path(sys.argv[1]), b'data', Path(sys.argv[2]))"
    argv = [str(node.cache.trees / "x"), str(spare)]
    killed = subprocess.run([sys.executable, "-c", code.format("KILL"), *argv], check=False)
    assert killed.returncode == -signal.SIGKILL
    (dead,) = spare.iterdir()
    with subprocess.Popen([sys.executable, "-c", code.format("STOP"), *argv]) as living:
        until(lambda: len(list(spare.iterdir())) == 2)
        (other,) = set(spare.iterdir()) - {dead}
        until(lambda: other.stat().st_size)
        assert mounter.sweep() == []  # both are young
        for path in (dead, other):
            os.utime(path, (1, 1))
        assert mounter.sweep() == [f"1 temporary files in {spare} that killed processes left: removed"]
        assert list(spare.iterdir()) == [other]
        living.send_signal(signal.SIGCONT)
        assert living.wait(20) == 0
    assert (node.cache.trees / "x").read_bytes() == b"data"
    assert list(spare.iterdir()) == []
