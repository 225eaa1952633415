"""`floe snapshotter` as a process: ready, status, one for a directory, a clean stop, crashes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from support.snapshots import SnapshotsClient

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
        assert time.monotonic() - started < 2
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
