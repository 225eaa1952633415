"""The pack filesystem's processes killed and stopped in every order, with reads under way."""

import hashlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.descriptor_store import DescriptorStore
from support.packfs import LIMIT, Packfs, alive, wait_for

from floe.fuse import descriptors
from floe.protos.packfs_control import PackfsClient
from floe.store.errors import UnavailableError

MIB = 1 << 20
KILLS = 10


@pytest.fixture
def packfs(tmp_path):
    fs = Packfs(tmp_path)
    yield fs
    fs.close()


def content(fs, pack_id):
    return (fs.packs_dir / pack_id).read_bytes()


def blocked_signals(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:"))
    mask = int(line.split()[1], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def finish(reader):
    out, err = reader.communicate(timeout=LIMIT)
    assert reader.returncode == 0, err.decode()
    return out


def test_a_killed_worker_s_requests_are_answered_by_its_successor(packfs):
    pack = packfs.add_pack(2 * MIB, shut=True)
    packfs.start()
    readers = [packfs.reader(pack, length=2 * MIB) for _ in range(8)]
    packfs.wait_inflight(pack, 8)
    old = packfs.kill_worker()
    packfs.wait_inflight(pack, 8)
    status = packfs.client.status()
    assert status["pid"] != old
    assert (status["workers"], status["takeovers"], status["left_requests"], status["replayed"]) == (2, 1, 8, 0)
    packfs.open_gate(pack)
    assert all(finish(reader) == content(packfs, pack) for reader in readers)
    status = packfs.client.status()
    assert (status["replayers"], status["replayed"]) == (1, 8)


def test_reads_survive_many_kills_and_most_kills_leave_work(packfs):
    pack = packfs.add_pack(48 * MIB, slow=True)
    packfs.start()
    data = content(packfs, pack)
    readers = []
    rng = random.Random(7)
    for _ in range(KILLS):
        while sum(reader.poll() is None for reader in readers) < 3:
            readers.append(packfs.reader(pack, length=len(data), digest=True))
        packfs.wait_ready()
        packfs.wait_inflight(pack, 1)
        time.sleep(rng.random() * 0.02)  # where in a request the kill falls is left to chance
        packfs.kill_worker()
    packfs.wait_ready()
    want = hashlib.sha256(data).hexdigest().encode()
    assert all(finish(reader) == want for reader in readers)
    status = packfs.client.status()
    assert status["workers"] == KILLS + 1
    assert status["replayers"] >= KILLS / 2


def test_an_interrupt_left_by_a_killed_worker_still_ends_its_reader(packfs):
    pack = packfs.add_pack(4096, shut=True)
    keeper = packfs.start()
    reader = packfs.reader(pack)
    packfs.wait_inflight(pack, 1)
    os.kill(keeper.pid, signal.SIGSTOP)  # so that no successor comes yet
    packfs.kill_worker()
    reader.kill()
    os.kill(keeper.pid, signal.SIGCONT)
    assert reader.wait(10) == -signal.SIGKILL


def test_a_killed_keeper_s_successor_adopts_the_worker(packfs):
    pack = packfs.add_pack(2 * MIB, shut=True)
    first = packfs.start()
    worker = packfs.pid_in("worker.pid")
    reader = packfs.reader(pack, length=2 * MIB)
    packfs.wait_inflight(pack, 1)
    first.kill()
    first.wait(LIMIT)
    assert packfs.client.inflight([pack]) == 1  # the worker serves on
    second = packfs.start()
    assert packfs.pid_in("worker.pid") == worker
    assert packfs.pid_in("keeper.pid") == second.pid
    packfs.open_gate(pack)
    assert finish(reader) == content(packfs, pack)
    packfs.kill_worker()  # no child of the second keeper, who must notice nevertheless
    wait_for(lambda: packfs.pid_in("worker.pid") != worker, "another worker")
    packfs.wait_ready()
    assert (packfs.mountpoint / pack).read_bytes() == content(packfs, pack)


def test_the_second_keeper_s_worker_answers_what_the_first_s_left(packfs):
    pack = packfs.add_pack(2 * MIB, shut=True)
    first = packfs.start()
    reader = packfs.reader(pack, length=2 * MIB)
    packfs.wait_inflight(pack, 1)
    first.kill()
    first.wait(LIMIT)
    packfs.start()
    packfs.kill_worker()
    packfs.wait_inflight(pack, 1)
    packfs.open_gate(pack)
    assert finish(reader) == content(packfs, pack)


def test_when_both_died_a_new_keeper_mounts_anew(packfs):
    pack = packfs.add_pack(2 * MIB)
    keeper = packfs.start()
    with (packfs.mountpoint / pack).open("rb") as old:
        os.kill(keeper.pid, signal.SIGKILL)
        keeper.wait(LIMIT)
        packfs.kill_worker()
        with pytest.raises(OSError, match=r"abort|not connected"):
            (packfs.mountpoint / pack).read_bytes()
        packfs.start()
        assert (packfs.mountpoint / pack).read_bytes() == content(packfs, pack)
        with pytest.raises(OSError, match=r"abort|not connected"):
            os.pread(old.fileno(), 10, 0)
    assert len(descriptors.mounttable.mounts_at(packfs.mountpoint)) == 1


def test_a_second_keeper_is_refused_naming_the_first(packfs):
    first = packfs.start()
    second = packfs.spawn_keeper()
    assert second.wait(LIMIT) == 1
    assert f"process {first.pid}" in packfs.log.read_text()
    assert packfs.pid_in("keeper.pid") == first.pid
    packfs.client.ping()


def test_sigterm_with_nothing_in_use_unmounts_and_ends(packfs):
    pack = packfs.add_pack(4096)
    keeper = packfs.start()
    worker = packfs.pid_in("worker.pid")
    assert (packfs.mountpoint / pack).read_bytes()
    keeper.terminate()
    assert keeper.wait(LIMIT) == 0
    assert not alive(worker)
    assert descriptors.mounted_device(packfs.run_dir) is None
    with pytest.raises(UnavailableError, match="does not answer"):
        packfs.client.ping()
    assert sorted(path.name for path in packfs.run_dir.iterdir()) == ["packs"]


def stop_in_use(packfs, keeper):
    keeper.terminate()
    wait_for(lambda: "packs are in use" in packfs.log.read_text(), "the keeper to say so")
    assert keeper.poll() is None


def test_stop_with_packs_in_use_keeps_the_keeper_and_the_next_start_resumes(packfs):
    pack = packfs.add_pack(2 * MIB)
    first = packfs.start()
    worker = packfs.pid_in("worker.pid")
    data = content(packfs, pack)
    with (packfs.mountpoint / pack).open("rb", buffering=0) as file:
        assert file.read(10) == data[:10]
        stop_in_use(packfs, first)
        assert not alive(worker)
        assert f"process {first.pid}" in packfs.log.read_text()
        with pytest.raises(UnavailableError):
            packfs.client.ping()
        waiting = packfs.reader(pack, length=2 * MIB)
        second = packfs.start()
        assert first.wait(LIMIT) == 0
        assert finish(waiting) == data
        assert os.pread(file.fileno(), 100, MIB) == data[MIB : MIB + 100]
    second.terminate()
    assert second.wait(LIMIT) == 0
    assert descriptors.mounted_device(packfs.run_dir) is None


def test_stop_lets_reads_under_way_finish_or_leaves_them_to_the_next(packfs):
    pack = packfs.add_pack(4096, shut=True)
    first = packfs.start()
    reader = packfs.reader(pack)
    packfs.wait_inflight(pack, 1)
    stop_in_use(packfs, first)
    assert reader.poll() is None
    packfs.open_gate(pack)
    packfs.start()
    assert finish(reader) == content(packfs, pack)


def test_a_stopped_keeper_ends_by_itself_when_the_last_pack_is_closed(packfs):
    pack = packfs.add_pack(4096)
    keeper = packfs.start()
    with (packfs.mountpoint / pack).open("rb"):
        stop_in_use(packfs, keeper)
    assert keeper.wait(LIMIT) == 0
    assert descriptors.mounted_device(packfs.run_dir) is None


@pytest.mark.parametrize("stopped", [False, True])
def test_force_ends_it_though_packs_are_in_use(packfs, stopped):
    pack = packfs.add_pack(4096)
    keeper = packfs.start()
    worker = packfs.pid_in("worker.pid")
    with (packfs.mountpoint / pack).open("rb", buffering=0) as file:
        if stopped:
            stop_in_use(packfs, keeper)
        assert packfs.spawn_keeper("--force").wait(LIMIT) == 0
        assert keeper.wait(LIMIT) == 0
        assert not alive(worker)
        assert descriptors.mounted_device(packfs.run_dir) is None
        with pytest.raises(OSError, match=r"abort|not connected"):
            file.read(10)


def test_a_keeper_started_with_force_ends_on_sigterm(packfs):
    pack = packfs.add_pack(4096)
    keeper = packfs.start("--force")
    with (packfs.mountpoint / pack).open("rb"):
        keeper.terminate()
        assert keeper.wait(LIMIT) == 0


# Process 1 of a PID namespace. $1: a folder.
_GOING_DOWN = """
import signal, sys
from pathlib import Path
from support.packfs import LIMIT, Packfs, wait_for

packfs = Packfs(Path(sys.argv[1]))
pack = packfs.add_pack(4096)
keeper = packfs.start()
with (packfs.mountpoint / pack).open("rb"):
    for name in ("systemd", "systemd"):
        Path("/proc/self/comm").write_text(name)
        said = packfs.log.read_text().count("packs are in use")
        keeper.terminate()
        wait_for(lambda: packfs.log.read_text().count("packs are in use") > said, "the keeper to say so")
        assert keeper.poll() is None
    Path("/proc/self/comm").write_text("systemd-shutdown")
    keeper.terminate()
    print(keeper.wait(LIMIT))
packfs.close()
"""


def test_a_machine_that_goes_down_does_not_wait_for_a_stopped_keeper(tmp_path):
    """systemd-shutdown is process 1 when all units are stopped, and waits for each process that is left."""
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        _GOING_DOWN,
        tmp_path,
    ]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * LIMIT, env=environ)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_a_worker_that_never_serves_is_given_up(packfs):
    keeper = packfs.spawn_keeper(worker_argv=["false"])
    assert keeper.wait(LIMIT) == 1
    assert "giving up" in packfs.log.read_text()
    assert descriptors.mounted_device(packfs.run_dir) is None


def test_node_ids_outlive_the_worker(packfs):
    pack = packfs.add_pack(MIB)
    packfs.start()
    path = packfs.mountpoint / pack
    inode = path.stat().st_ino
    with path.open("rb", buffering=0) as file:
        packfs.kill_worker()
        packfs.wait_ready()
        (packfs.packs_dir / pack).rename(packfs.base / "aside")  # a name the worker must not ask the reader for
        assert os.fstat(file.fileno()).st_ino == inode
        assert path.stat().st_size == MIB
        (packfs.base / "aside").rename(packfs.packs_dir / pack)
        assert file.read(4096) == content(packfs, pack)[:4096]


class Systemd:
    """As much of systemd as a service with a descriptor store sees."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(LIMIT)
        self.path, self.fds, self.states = path, {}, []

    def wait_for(self, word):
        while True:
            data, control, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(64))
            lines = data.decode().splitlines()
            self.states += lines
            received = [fd for _, kind, raw in control for fd in struct.unpack(f"{len(raw) // 4}i", raw)]
            if "FDSTORE=1" in lines:
                name = next(line.partition("=")[2] for line in lines if line.startswith("FDNAME="))
                assert len(received) == 1
                if name in self.fds:
                    os.close(self.fds[name])
                self.fds[name] = received[0]
            elif received:
                raise AssertionError("descriptors without FDSTORE")
            if word in lines:
                return

    def close(self):
        self.sock.close()
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


def test_systemd_s_watchdog_hears_of_the_keeper_while_it_runs_and_not_while_it_hangs(packfs, tmp_path_factory):
    systemd = Systemd(tmp_path_factory.mktemp("n") / "s")
    try:
        keeper = packfs.start(env={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "1000000"})
        systemd.wait_for("READY=1")
        for _ in range(3):
            systemd.wait_for("WATCHDOG=1")
        packfs.kill_worker()  # a keeper that waits for one lives
        systemd.wait_for("WATCHDOG=1")
        keeper.send_signal(signal.SIGSTOP)
        systemd.sock.settimeout(1.2)
        with pytest.raises(TimeoutError):
            [systemd.wait_for("WATCHDOG=1") for _ in range(4)]  # some were sent before
        keeper.send_signal(signal.SIGCONT)
        systemd.wait_for("WATCHDOG=1")
    finally:
        systemd.close()


def test_systemd_s_descriptor_store_outlives_keeper_and_worker(packfs, tmp_path_factory):
    systemd = Systemd(tmp_path_factory.mktemp("n") / "s")
    try:
        pack = packfs.add_pack(2 * MIB, shut=True)
        keeper = packfs.start(env={"NOTIFY_SOCKET": str(systemd.path)})
        systemd.wait_for("READY=1")
        assert sorted(systemd.fds) == ["floe-fuse", "floe-slots"]
        reader = packfs.reader(pack, length=2 * MIB)
        packfs.wait_inflight(pack, 1)
        keeper.kill()
        keeper.wait(LIMIT)
        packfs.kill_worker()
        packfs.open_gate(pack)

        # Whoever is not given them leaves the mount alone.
        assert packfs.spawn_keeper().wait(LIMIT) == 1
        assert "is held by another process, systemd perhaps" in packfs.log.read_text()
        assert reader.poll() is None

        # As systemd does before exec: descriptors from 3 on, LISTEN_PID the process's own.
        names = sorted(systemd.fds)
        high = [os.dup(systemd.fds[name]) for name in names]
        shell = 'export LISTEN_PID=$$; exec "$@" ' + " ".join(f"{3 + n}<&{fd}" for n, fd in enumerate(high))
        for fd in high:
            os.set_inheritable(fd, True)
        second = packfs.spawn_keeper(
            env={"LISTEN_FDS": "2", "LISTEN_FDNAMES": ":".join(names), "NOTIFY_SOCKET": str(systemd.path)},
            prefix=["/bin/bash", "-c", shell, "sh"],
            pass_fds=high,
        )
        for fd in high:
            os.close(fd)
        packfs.wait_ready(second)
        assert "took the mount over from systemd" in packfs.log.read_text()
        assert finish(reader) == content(packfs, pack)
        second.terminate()
        systemd.wait_for("STOPPING=1")
        assert second.wait(LIMIT) == 0
    finally:
        systemd.close()


def test_a_keeper_that_is_told_to_stop_while_it_starts_takes_the_mount_over_first(packfs, tmp_path_factory):
    """When a unit was stopped, systemd closes what it kept for it: the mount would end with its readers."""
    unit = Path(__file__).parents[2] / "install/systemd/floe-packfs.service"
    (start,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
    prefix = start.removeprefix("ExecStart=").partition("/usr/local/bin/floe")[0].split()
    store = DescriptorStore(tmp_path_factory.mktemp("n") / "s")
    try:
        pack = packfs.add_pack(2 * MIB, shut=True)
        keeper = packfs.start(env={"NOTIFY_SOCKET": str(store.address)})
        reader = packfs.reader(pack, length=2 * MIB)
        packfs.wait_inflight(pack, 1)
        keeper.kill()
        keeper.wait(LIMIT)
        packfs.kill_worker()
        argv, env, passed = store.command([])
        second = packfs.spawn_keeper(env=env, prefix=[*prefix, *argv], pass_fds=passed)
        for fd in passed:
            os.close(fd)
        wait_for(lambda: signal.SIGTERM in blocked_signals(second.pid), "env to hold the signal back")
        second.terminate()
        wait_for(lambda: "the keeper stays" in packfs.log.read_text(), "the keeper")
        store.forget()
        packfs.open_gate(pack)
        third = packfs.spawn_keeper()
        packfs.wait_ready(third)
        assert finish(reader) == content(packfs, pack)
        assert second.wait(LIMIT) == 0
    finally:
        store.close()


def test_control_socket_answers_nonsense_with_an_error(packfs):
    packfs.start()
    path = packfs.run_dir / "packfs.sock"
    directory = os.open(packfs.run_dir, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        sock.sendall(b'nonsense\n{"op":"dance"}\n{"op":"inflight","packs":"x"}\n{"op":"ping"}\n')
        with sock.makefile("rb") as lines:
            answers = [lines.readline() for _ in range(4)]
    os.close(directory)
    assert [b'"ok":true' in answer for answer in answers] == [False, False, False, True]
    assert PackfsClient(packfs.run_dir).inflight([]) == 0
