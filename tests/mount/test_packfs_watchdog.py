"""Workers that live and do not answer, and requests that end every worker that takes them up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.packfs import LIMIT, Packfs, wait_for

MIB = 1 << 20
KILLS = 8
# A keeper in a hurry. The pulse comes once a second.
HASTY = """
import sys
from floe.fuse import keeper, watchdog
watchdog._STOPPED, watchdog._SILENT, watchdog._GRACE, watchdog._SCAN = 2.0, 2.0, 0.5, 0.5
keeper._BACKOFF_LAST = 0.1
sys.exit(keeper.main(sys.argv[1:]))
"""


@pytest.fixture
def packfs(tmp_path):
    fs = Packfs(tmp_path)
    yield fs
    fs.close()


def start(packfs):
    keeper = packfs.spawn_keeper(command=[sys.executable, "-c", HASTY])
    packfs.wait_ready(keeper)
    return keeper


def content(packfs, pack):
    return (packfs.packs_dir / pack).read_bytes()


def finish(reader):
    out, err = reader.communicate(timeout=LIMIT)
    assert reader.returncode == 0, err.decode()
    return out


def replaced(packfs, worker):
    wait_for(lambda: packfs.pid_in("worker.pid") not in (0, worker), "another worker", limit=2 * LIMIT)
    packfs.wait_ready()
    return packfs.client.status()


def status(packfs, *names):
    found = packfs.client.status()
    return tuple(found[name] for name in names)


def test_a_stopped_worker_is_killed_and_replaced(packfs):
    pack = packfs.add_pack(2 * MIB, shut=True)
    start(packfs)
    reader = packfs.reader(pack, length=2 * MIB)
    packfs.wait_inflight(pack, 1)
    worker = packfs.pid_in("worker.pid")
    os.kill(worker, signal.SIGSTOP)
    found = replaced(packfs, worker)
    assert (found["restarts"], found["silent_workers"]) == (1, 1)
    assert f"worker {worker} is stopped by a signal" in packfs.log.read_text()
    packfs.open_gate(pack)
    assert finish(reader) == content(packfs, pack)


def test_a_worker_whose_threads_all_hang_is_replaced(packfs):
    hanging, other = packfs.add_pack(64 * 4096, seed=1), packfs.add_pack(MIB, seed=2)
    start(packfs)
    assert (packfs.mountpoint / other).stat()
    worker = packfs.pid_in("worker.pid")
    packfs.gate(hanging, "disk")
    readers = [packfs.reader(hanging, offset=4096 * n) for n in range(8)]
    packfs.wait_inflight(hanging, 8)
    waiting = packfs.reader(other, length=MIB)
    wait_for(lambda: f"worker {worker} has asked for no request" in packfs.log.read_text(), "the watchdog")
    packfs.open_gate(hanging, "disk")
    assert replaced(packfs, worker)["silent_workers"] == 1
    assert finish(waiting) == content(packfs, other)
    data = content(packfs, hanging)
    assert [finish(reader) for reader in readers] == [data[4096 * n : 4096 * (n + 1)] for n in range(8)]


def test_one_request_that_hangs_gets_an_error_once_it_is_overdue(packfs):
    hanging, waiting = packfs.add_pack(4096, seed=1), packfs.add_pack(4096, seed=2, shut=True)
    (packfs.gates / "patience").write_text("1.0")
    start(packfs)
    worker = packfs.pid_in("worker.pid")
    packfs.gate(hanging, "disk")
    stuck = packfs.reader(hanging)
    packfs.wait_inflight(hanging, 1)
    (packfs.gates / "patience").unlink()  # for the next worker, which then waits for ever
    found = replaced(packfs, worker)
    assert b"Errno 110" in stuck.communicate(timeout=LIMIT)[1]
    assert (found["overdue_requests"], found["poisonous_requests"], found["silent_workers"]) == (1, 0, 1)
    assert f"a read of 4096 bytes at 0 of pack {hanging} was not answered in time" in packfs.log.read_text()
    reader = packfs.reader(waiting)
    packfs.open_gate(waiting)
    assert finish(reader) == content(packfs, waiting)


def test_nobody_is_killed_for_waiting_nor_for_not_having_run(packfs):
    pack = packfs.add_pack(4096, shut=True)
    keeper = start(packfs)
    worker = packfs.pid_in("worker.pid")
    reader = packfs.reader(pack)
    packfs.wait_inflight(pack, 1)
    for process in (keeper.pid, worker):  # as when the machine is suspended
        os.kill(process, signal.SIGSTOP)
    time.sleep(2.5)
    for process in (keeper.pid, worker):  # the keeper sees the worker stopped, and cannot know for how long
        os.kill(process, signal.SIGCONT)
    time.sleep(1.2)
    assert packfs.client.ping() == worker
    assert "killing" not in packfs.log.read_text()
    assert status(packfs, "restarts", "silent_workers") == (0, 0)
    packfs.open_gate(pack)
    assert finish(reader) == content(packfs, pack)


def test_a_request_that_ends_workers_gets_an_error_alone(packfs):
    bad, waiting = packfs.add_pack(4 * MIB, seed=1), packfs.add_pack(64 * 4096, seed=2, shut=True)
    start(packfs)
    readers = [packfs.reader(waiting, offset=4096 * n) for n in range(2)]
    packfs.wait_inflight(waiting, 2)
    (packfs.gates / f"{bad}.crash").write_text(str(2 * MIB + 5))
    victim = packfs.reader(bad, offset=2 * MIB)
    assert b"Errno 5" in victim.communicate(timeout=3 * LIMIT)[1]
    packfs.wait_ready()
    restarts, *counts = status(packfs, "restarts", "silent_workers", "poisonous_requests", "overdue_requests")
    assert counts == [0, 1, 0]
    assert restarts >= 4
    log = packfs.log.read_text()
    assert f"a read of 4096 bytes at {2 * MIB} of pack {bad} ended workers again and again" in log
    assert "killing" not in log
    # What is around it reads on, and itself fails at once for a while.
    data = content(packfs, bad)
    with (packfs.mountpoint / bad).open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), MIB, MIB) == data[MIB : 2 * MIB]
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 4096, 2 * MIB)
        assert os.pread(file.fileno(), MIB, 2 * MIB + 4096) == data[2 * MIB + 4096 : 3 * MIB + 4096]
    packfs.wait_inflight(waiting, 2)
    packfs.open_gate(waiting)
    data = content(packfs, waiting)
    assert [finish(reader) for reader in readers] == [data[4096 * n : 4096 * (n + 1)] for n in range(2)]
    assert status(packfs, "restarts", "poisonous_requests") == (restarts, 1)


def test_kills_by_others_are_no_request_s_fault(packfs):
    pack = packfs.add_pack(4096, shut=True)
    packfs.start()
    reader = packfs.reader(pack)
    for _ in range(KILLS):
        packfs.wait_inflight(pack, 1)
        packfs.kill_worker()
    packfs.wait_inflight(pack, 1)
    assert status(packfs, "restarts", "poisonous_requests") == (KILLS, 0)
    packfs.open_gate(pack)
    assert finish(reader) == content(packfs, pack)


MAP = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
print("mapped", flush=True)
sys.stdin.read(1)
print(mapped[0])
"""


@pytest.mark.parametrize("absent", [False, True])
def test_a_killed_reader_of_mapped_memory_is_gone(packfs, absent):
    pack = packfs.add_pack(MIB, shut=True)
    keeper = packfs.start()
    command = [sys.executable, "-c", MAP, str(packfs.mountpoint / pack)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout.readline() == b"mapped\n"
            if absent:  # a worker that is killed, and none to follow: the request waits in the kernel
                os.kill(keeper.pid, signal.SIGSTOP)
                packfs.kill_worker()
            reader.stdin.write(b"x")
            reader.stdin.flush()
            if absent:
                stat = Path(f"/proc/{reader.pid}/stat")
                wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "D", "the reader's wait")
            else:
                packfs.wait_inflight(pack, 1)
            reader.kill()
            assert reader.wait(LIMIT) == -signal.SIGKILL
        finally:
            reader.kill()
            os.kill(keeper.pid, signal.SIGCONT)
