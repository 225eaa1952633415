"""A worker that was killed but hangs in the kernel, and a node that lacks what a new worker needs."""

import os
import signal
import sys

import pytest
from support.packfs import LIMIT, Packfs, alive, wait_for
from support.stuck_folder import StuckFolder

from floe.fuse import descriptors
from floe.store import process

MIB = 1 << 20
needs_pidfd_thread = pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="PIDFD_THREAD came with Linux 6.9"
)


@pytest.fixture
def packfs(tmp_path):
    fs = Packfs(tmp_path)
    yield fs
    fs.close()


@pytest.fixture
def hanging(packfs, tmp_path):
    """(pack, keeper, reader with a read in flight, worker): the worker was killed, one of its threads stays."""
    stuck = StuckFolder(tmp_path / "stuck")
    try:
        (packfs.gates / "stuck").write_text(f"{stuck.path}/x")
        pack = packfs.add_pack(2 * MIB, shut=True)
        keeper = packfs.start()
        assert stuck.asked.wait(LIMIT)
        (packfs.gates / "stuck").unlink()
        reader = packfs.reader(pack, length=2 * MIB)
        packfs.wait_inflight(pack, 1)
        worker = packfs.pid_in("worker.pid")
        yield pack, keeper, reader, worker
    finally:
        stuck.let_go()


def kill(worker):
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(worker), "the first thread's end")  # the others' come right after
    assert process.is_doomed(worker)


def finish(packfs, pack, reader):
    packfs.open_gate(pack)
    out, err = reader.communicate(timeout=LIMIT)
    assert reader.returncode == 0, err.decode()
    assert out == (packfs.packs_dir / pack).read_bytes()


def test_a_killed_worker_that_hangs_in_the_kernel_is_not_waited_for(packfs, hanging):
    pack, _, reader, worker = hanging
    kill(worker)
    wait_for(lambda: packfs.pid_in("worker.pid") != worker, "another worker")
    packfs.wait_inflight(pack, 1)
    assert f"worker {worker} was killed and hangs" in packfs.log.read_text()
    assert process.is_doomed(worker)
    finish(packfs, pack, reader)
    # The successor is a worker like any other, though its predecessor still holds the lock on the slots.
    successor = packfs.kill_worker()
    wait_for(lambda: packfs.pid_in("worker.pid") != successor, "a third worker")
    packfs.wait_ready()
    assert (packfs.mountpoint / pack).read_bytes() == (packfs.packs_dir / pack).read_bytes()


@needs_pidfd_thread
def test_the_mount_is_taken_out_of_a_worker_that_hangs_when_the_keeper_died_too(packfs, hanging):
    pack, keeper, reader, worker = hanging
    keeper.kill()
    keeper.wait(LIMIT)
    kill(worker)
    packfs.start()
    assert f"took the mount over from process {worker}" in packfs.log.read_text()
    assert packfs.pid_in("worker.pid") != worker
    finish(packfs, pack, reader)


def test_a_keeper_adopts_the_successor_and_not_the_one_that_hangs(packfs, hanging):
    pack, keeper, reader, worker = hanging
    kill(worker)
    successor = wait_for(lambda: packfs.pid_in("worker.pid") not in (0, worker) and packfs.pid_in("worker.pid"), "it")
    packfs.wait_inflight(pack, 1)
    keeper.kill()
    keeper.wait(LIMIT)
    packfs.start()
    wait_for(lambda: f"adopted worker {successor}" in packfs.log.read_text(), "the adoption")
    assert packfs.pid_in("worker.pid") == successor
    finish(packfs, pack, reader)


FAILING = """
import errno, os, sys
from pathlib import Path
from floe.fuse import keeper
left = {"fork": 1, "pipe2": 1, "pidfd_open": 1}
def failing(name, call):
    def run(*arguments):
        if served.exists() and left[name]:
            left[name] -= 1
            raise OSError(errno.EAGAIN, "shortage of " + name)
        return call(*arguments)
    return run
run_dir = sys.argv[2]
served = Path(run_dir, "shortage")
for name in left:
    setattr(os, name, failing(name, getattr(os, name)))
sys.exit(keeper.main(sys.argv[1:]))
"""


def test_a_shortage_when_a_worker_is_to_start_ends_neither_keeper_nor_reads(packfs):
    pack = packfs.add_pack(2 * MIB, shut=True)
    command = [sys.executable, "-c", FAILING]
    keeper = packfs.spawn_keeper(command=command)
    packfs.wait_ready(keeper)
    reader = packfs.reader(pack, length=2 * MIB)
    packfs.wait_inflight(pack, 1)
    (packfs.run_dir / "shortage").touch()
    packfs.kill_worker()
    packfs.wait_inflight(pack, 1)
    log = packfs.log.read_text()
    assert [name for name in ("fork", "pipe2", "pidfd_open") if f"shortage of {name}" in log] == [
        "fork",
        "pipe2",
        "pidfd_open",
    ]
    assert keeper.poll() is None
    finish(packfs, pack, reader)


def test_a_worker_whose_pid_cannot_be_written_serves_and_is_written_later(packfs):
    pack = packfs.add_pack(4096)
    keeper = packfs.start()
    blocker = packfs.run_dir / "worker.new"
    blocker.mkdir()  # where worker.pid is made
    old = packfs.kill_worker()
    wait_for(lambda: "cannot write" in packfs.log.read_text(), "the keeper's warning")
    packfs.wait_ready(keeper)
    assert (packfs.mountpoint / pack).read_bytes()
    assert packfs.pid_in("worker.pid") == old
    blocker.rmdir()
    wait_for(lambda: packfs.pid_in("worker.pid") == packfs.client.ping(), "worker.pid")


def test_a_keeper_goes_on_when_nobody_takes_its_messages(packfs):
    pack = packfs.add_pack(4096)
    read_end, write_end = os.pipe()
    keeper = packfs.spawn_keeper(stderr=write_end)
    os.close(write_end)
    packfs.wait_ready(keeper)
    os.close(read_end)
    packfs.kill_worker()
    packfs.wait_ready(keeper)
    assert (packfs.mountpoint / pack).read_bytes()
    assert descriptors.mounted_device(packfs.run_dir) is not None
