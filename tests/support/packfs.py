"""A real pack filesystem over local files: keeper and worker as processes, everything private, all cleaned up."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from floe.fuse import descriptors
from floe.protos.packfs_control import PackfsClient
from floe.store.errors import UnavailableError
from floe.store.ids import hexdigest

WORKER = Path(__file__).with_name("packfs_worker.py")
LIMIT = 20.0  # seconds that anything here may take before a test fails


def wait_for(condition, what, limit=LIMIT):
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {limit} s for {what}"
        time.sleep(0.005)
    return value


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def holds_fuse(pid):
    with contextlib.suppress(OSError):
        return any(str(fd.readlink()) == "/dev/fuse" for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


class Packfs:
    def __init__(self, base):
        self.base = base
        self.run_dir = base / "run"
        self.packs_dir = base / "packs-content"
        self.gates = base / "gates"
        for path in (self.packs_dir, self.gates):
            path.mkdir()
        self.mountpoint = self.run_dir / "packs"
        self.log = base / "packfs.log"
        self.client = PackfsClient(self.run_dir)
        self.keepers = []
        self.readers = []

    # --- packs ---

    def add_pack(self, size, seed=0, slow=False, shut=False):
        data = random.Random(seed).randbytes(size)
        return self.add_content(data, slow=slow, shut=shut)

    def add_content(self, data, slow=False, shut=False):
        pack_id = hexdigest(data)
        (self.packs_dir / pack_id).write_bytes(data)
        if slow or shut:
            self.gate(pack_id, "slow")
        if shut:
            self.gate(pack_id, "shut")
        return pack_id

    def gate(self, pack_id, kind):
        (self.gates / f"{pack_id}.{kind}").touch()

    def open_gate(self, pack_id, kind="shut"):
        (self.gates / f"{pack_id}.{kind}").unlink()

    # --- processes ---

    def worker_argv(self):
        return [sys.executable, str(WORKER), str(self.run_dir), str(self.packs_dir), str(self.gates)]

    def spawn_keeper(self, *flags, env=None, worker_argv=None, prefix=(), pass_fds=(), command=None, stderr=None):
        command = command or [*prefix, sys.executable, "-m", "floe.fuse.keeper"]
        command = [*command, "--run-dir", str(self.run_dir), *flags]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*command, "--", *(worker_argv or self.worker_argv())],
                stderr=log if stderr is None else stderr,
                pass_fds=pass_fds,
                cwd="/",  # as systemd does; in a checkout its code would be run, whatever is installed
                env={**os.environ, **(env or {})},
            )
        self.keepers.append(process)
        return process

    def start(self, *flags, env=None):
        keeper = self.spawn_keeper(*flags, env=env)
        self.wait_ready(keeper)
        return keeper

    def wait_ready(self, keeper=None):
        def ready():
            assert keeper is None or keeper.poll() is None, self.log.read_text()
            if keeper is not None and not holds_fuse(keeper.pid):
                return 0  # until it does, the worker's death would take the mount along
            with contextlib.suppress(UnavailableError):
                return self.client.ping()
            return 0

        return wait_for(ready, "the worker")

    def pid_in(self, name):
        with contextlib.suppress(OSError, ValueError):
            return int((self.run_dir / name).read_text())
        return 0

    def kill_worker(self):
        """kill -9, and wait until it is gone; its pid."""
        pid = self.pid_in("worker.pid")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), "the worker's end")
        return pid

    def reader(self, pack_id, offset=0, length=4096, digest=False):
        """A process that reads through the mount; its stdout is what it read, or the SHA-256 of that in hex.

        What is more than a pipe holds (64 KiB) must be drained while it reads: else ask for the digest.
        """
        code = (
            "import hashlib,os,sys\n"
            "fd=os.open(sys.argv[1],os.O_RDONLY); left=int(sys.argv[3]); at=int(sys.argv[2])\n"
            "digest=hashlib.sha256(); put=digest.update if sys.argv[4] else sys.stdout.buffer.write\n"
            "while left:\n"
            " data=os.pread(fd,min(left,1<<20),at)\n"
            " assert data; put(data); at+=len(data); left-=len(data)\n"
            "if sys.argv[4]: sys.stdout.write(digest.hexdigest())\n"
        )
        argv = [
            sys.executable,
            "-c",
            code,
            str(self.mountpoint / pack_id),
            str(offset),
            str(length),
            "digest"[: 6 * digest],
        ]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.readers.append(process)
        return process

    def wait_inflight(self, pack_id, count):
        def reached():
            with contextlib.suppress(UnavailableError):
                return self.client.inflight([pack_id]) >= count
            return False

        wait_for(reached, f"{count} reads in flight")

    def close(self):
        for gate in self.gates.iterdir():
            gate.unlink()
        descriptors.detach(self.run_dir)
        pids = {self.pid_in("worker.pid"), self.pid_in("keeper.pid")}
        for keeper in self.keepers:
            if keeper.poll() is None:
                keeper.kill()
            keeper.wait(LIMIT)
        pids.add(self.pid_in("worker.pid"))  # one that was started when the mount went
        for pid in pids - {0}:
            with contextlib.suppress(OSError):  # it is gone already
                if str(self.run_dir) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        for process in self.readers:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=LIMIT)
        descriptors.detach(self.run_dir)
