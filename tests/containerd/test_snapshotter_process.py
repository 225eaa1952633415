"""`floe snapshotter` as a process: ready, status, one for a directory, a clean stop, crashes."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from support.snapshots import DirectoryLayers, SnapshotsClient, status

from floe.rpc import server as rpc_server
from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.daemon import run
from floe.snapshotter.snapshotter import Figures, Snapshotter
from floe.snapshotter.statussocket import StatusSocket
from floe.store.errors import BusyError, DamagedError, NoSpaceError, UnavailableError

pytestmark = pytest.mark.timeout(60)


class Process:
    """The daemon with private directories; `ready` waits for systemd's notification."""

    def __init__(self, base):
        self.base = base
        self.run_dir = base / "run"
        self.root = base / "root"
        self.address = self.run_dir / "snapshotter.sock"
        self.log = base / "log"
        base.mkdir(exist_ok=True)

    def command(self, *extra):
        return [
            sys.executable,
            "-m",
            "floe",
            "snapshotter",
            f"--address={self.address}",
            f"--root={self.root}",
            f"--run-dir={self.run_dir}",
            f"--cache-dir={self.base}/cache",
            f"--store=file://{self.base}/store",
            "--index=none",
            *extra,
        ]

    @contextmanager
    def running(self):
        notify = self.base / "notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox, self.log.open("ab") as log:
            inbox.bind(str(notify))
            inbox.settimeout(0.2)
            process = subprocess.Popen(
                self.command(), stderr=log, stdout=log, env={**os.environ, "NOTIFY_SOCKET": str(notify)}
            )
            try:
                self.wait_ready(inbox, process)
                yield process
            finally:
                process.terminate()
                process.wait(timeout=20)

    def wait_ready(self, inbox, process):
        until = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < until:
            try:
                assert b"READY=1" in inbox.recv(4096)
            except TimeoutError:
                continue
            return
        pytest.fail(f"the snapshotter did not start:\n{self.log.read_text()}")

    def status(self):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.run_dir / "snapshotter-status.sock"))
            return json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))


@pytest.fixture
def daemon(tmp_path):
    return Process(tmp_path / "d")


def resident(pid):
    """Resident memory in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_serves_tells_and_stops(daemon):
    with daemon.running() as process:
        with SnapshotsClient(daemon.address) as client:
            for number in range(200):
                client.prepare(f"k{number}", "")
            client.commit("c", "k0")
            client.view("v", "c")
        told = daemon.status()
        assert (told["pid"], told["breaker"], told["mounts"]) == (process.pid, "closed", 0)
        assert told["snapshots"] == {"active": 199, "view": 1, "committed": 1, "lazy": 0}
        assert told["version"]
        assert set(told["fallbacks"]) >= {"not_indexed", "store_unavailable", "timeout", "breaker_open", "damaged"}
        assert resident(process.pid) < 120
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert not (daemon.run_dir / "snapshotter-status.sock").exists()
    assert len(list((daemon.root / "s").iterdir())) == 201


def test_second_daemon_on_a_directory_names_the_first(daemon):
    with daemon.running() as process:
        second = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert str(process.pid) in second.stderr
        with SnapshotsClient(daemon.address) as client:
            client.prepare("still served", "")


def test_second_daemon_on_a_run_directory_harms_nothing(daemon):
    with daemon.running() as process:
        before = daemon.status()["pid"]
        flags = (f"--root={daemon.base}/another", f"--address={daemon.base}/another.sock")
        second = subprocess.run(daemon.command(*flags), capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert str(process.pid) in second.stderr
        assert str(daemon.run_dir) in second.stderr
        assert daemon.status()["pid"] == before == process.pid


def test_a_status_socket_that_is_served_is_not_taken(tmp_path):
    first = StatusSocket(tmp_path, lambda: Figures({}, {}, "closed", 0, 0, {}))
    with pytest.raises(BusyError, match="another process listens"):
        StatusSocket(tmp_path, lambda: Figures({}, {}, "closed", 0, 0, {}))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "snapshotter-status.sock"))
        assert json.loads(connection.makefile().readline())["pid"] == os.getpid()
    first.close()
    # What a killed one left is replaced.
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "snapshotter-status.sock"))
    StatusSocket(tmp_path, lambda: Figures({}, {}, "closed", 0, 0, {})).close()


def test_a_status_socket_answers_again_after_a_moment_without_descriptors(tmp_path):
    served = StatusSocket(tmp_path, lambda: Figures({}, {}, "closed", 0, 0, {}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        second.settimeout(20)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            first.connect(str(tmp_path / "snapshotter-status.sock"))  # whose descriptor the kernel has set aside
            second.connect(str(tmp_path / "snapshotter-status.sock"))
            time.sleep(0.2)  # in which the second cannot be accepted
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with second.makefile() as answer:
            assert json.loads(answer.readline())["pid"] == os.getpid()
    served.close()


def test_a_stop_waits_for_a_clean_up_to_end_early(tmp_path):
    """The claim on the root stays until nobody changes it any more, which is soon."""
    config = SnapshotterConfig(
        address=tmp_path / "r" / "s.sock",
        root=tmp_path / "root",
        run_dir=tmp_path / "r",
        cache_dir=tmp_path / "cache",
        store_url="memory://",
    )
    layers, stop = DirectoryLayers(), threading.Event()
    entered, leave = threading.Event(), threading.Event()

    def slow_unlink(name, *, dir_fd=None):
        if dir_fd is not None:
            entered.set()
            leave.wait(20)
        real_unlink(name, dir_fd=dir_fd)

    real_unlink = os.unlink
    server = threading.Thread(target=run, args=(config, layers, stop))
    with pytest.MonkeyPatch.context() as patch, SnapshotsClient(config.address) as client:
        patch.setattr(rpc_server, "GRACE", 0.1)
        server.start()
        uppers = [Path(client.prepare(key, "")[0].source) for key in ("old", "young")]
        for upper in uppers:
            for number in range(10):
                (upper / str(number)).touch()
        for key in ("old", "young"):
            client.remove(key)
        patch.setattr(os, "unlink", slow_unlink)
        with ThreadPoolExecutor(1) as pool:
            cleaning = pool.submit(status, client.cleanup)
            assert entered.wait(20)
            stop.set()
            # The call is given up, but its thread is not done: nor is the server.
            assert cleaning.result() is not grpc.StatusCode.OK
            server.join(1)
            assert server.is_alive()
            leave.set()
            server.join(20)
    assert not server.is_alive()
    # One file was being deleted, the others are left to the next start.
    assert sorted(len(list(upper.iterdir())) for upper in uppers) == [9, 10]
    again = Snapshotter(config, layers)
    again.start()
    again.tidy()
    again.close()
    assert not any(upper.exists() for upper in uppers)


@contextmanager
def watched(tmp_path, monkeypatch):
    """One that tells systemd that it lives; what it tells."""
    config = SnapshotterConfig(
        address=tmp_path / "r" / "s.sock",
        root=tmp_path / "root",
        run_dir=tmp_path / "r",
        cache_dir=tmp_path / "cache",
        store_url="memory://",
    )
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(0.5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        running = threading.Thread(target=run, args=(config, DirectoryLayers(), stop))
        running.start()
        try:
            assert inbox.recv(100) == b"READY=1"
            yield inbox
        finally:
            stop.set()
            running.join()


def test_one_that_hangs_in_its_database_says_no_more_that_it_lives(tmp_path, monkeypatch):
    go = threading.Event()
    go.set()
    metrics = Snapshotter.metrics

    def asked(self):
        go.wait(20)
        return metrics(self)

    monkeypatch.setattr(Snapshotter, "metrics", asked)
    with watched(tmp_path, monkeypatch) as inbox:
        try:
            assert [inbox.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            go.clear()
            with pytest.raises(TimeoutError):
                [inbox.recv(100) for _ in range(3)]  # one may have been on its way
            go.set()
            assert inbox.recv(100) == b"WATCHDOG=1"
        finally:
            go.set()


def test_one_whose_database_fails_lives_on_and_says_so(tmp_path, monkeypatch, caplog):
    problems = iter([UnavailableError("it is locked"), DamagedError("it is damaged"), NoSpaceError("its disk is full")])
    metrics = Snapshotter.metrics

    def asked(self):
        for problem in problems:
            raise problem
        return metrics(self)

    with watched(tmp_path, monkeypatch) as inbox:
        monkeypatch.setattr(Snapshotter, "metrics", asked)
        assert [inbox.recv(100) for _ in range(6)] == [b"WATCHDOG=1"] * 6
    assert all(words in caplog.text for words in ("it is locked", "it is damaged", "its disk is full"))


def test_a_signal_that_another_thread_gets_stops_it():
    script = (
        "import signal; from floe.store.stopsignal import stop_signal; stop = stop_signal();"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); print(flush=True); stop.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    with process:
        process.stdout.readline()
        process.terminate()
        try:
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_survives_kill(daemon):
    with daemon.running() as process, SnapshotsClient(daemon.address) as client:
        client.prepare("a", "")
        client.commit("c", "a")
        process.kill()
        process.wait()
    with daemon.running(), SnapshotsClient(daemon.address) as client:
        assert client.names() == {"c"}


def test_store_that_cannot_be_reached_does_not_keep_a_node_from_working(tmp_path):
    daemon = Process(tmp_path / "d")
    # A port nobody listens on: every look-up fails.
    store = "s3://bucket/x?endpoint=http://127.0.0.1:9&region=r&path_style=true"
    daemon.command = lambda *extra: [*Process.command(daemon, *extra), f"--store={store}", "--prepare-timeout=0.5"]
    with daemon.running(), SnapshotsClient(daemon.address) as client:
        started = time.monotonic()
        mounts = client.prepare("k", "", {"containerd.io/snapshot.ref": "sha256:" + "a" * 64})
        assert mounts
        assert time.monotonic() - started < 10  # a request's own retries take half a minute
        told = daemon.status()
        counted = {reason: count for reason, count in told["fallbacks"].items() if count}
        assert sum(counted.values()) == 1
        # Not "not_indexed": nobody knows that.
        assert set(counted) <= {"store_unavailable", "timeout"}
        assert told["breaker"] == "open"
    assert re.search("reason (store_unavailable|timeout): ", daemon.log.read_text())


def test_an_unreachable_store_fails_the_pull_where_that_is_wanted(tmp_path):
    daemon = Process(tmp_path / "d")
    store = "s3://bucket/x?endpoint=http://127.0.0.1:9&region=r&path_style=true"
    flags = (f"--store={store}", "--prepare-timeout=0.5", "--on-store-error=error")
    daemon.command = lambda *extra: [*Process.command(daemon, *extra), *flags]
    with daemon.running(), SnapshotsClient(daemon.address) as client:
        labels = {"containerd.io/snapshot.ref": "sha256:" + "a" * 64}
        with pytest.raises(grpc.RpcError) as caught:
            client.prepare("k", "", labels)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "on_store_error" in caught.value.details()
        client.prepare("ordinary", "")
        assert client.names() == {"ordinary"}
