"""A machine and what it depends on: an S3 server behind a bad line, Redis, a registry, Floe's daemons, containerd.

The node cache is a small disk of its own, which can be filled up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from soak.line import Line
from support.blobhost import BlobHost
from support.containerd import Containerd, Version
from support.cri import Cri
from support.descriptor_store import DescriptorStore
from support.floe_daemons import START_TIME, Daemons
from support.mounts import until
from support.redis_server import RedisServer
from support.seaweed import Seaweed
from support.snapshots import SnapshotsClient

from floe.protos.packfs_control import PackfsClient
from floe.store.errors import UnavailableError

MIB = 1 << 20
CACHE_SIZE = 48 * MIB
CACHE_DISK = 256 * MIB
_COMMAND_TIME = 150.0


class Node(Daemons):
    """Both daemons; with `stored`, as systemd runs packfs: a store keeps its descriptors from one start to the next."""

    def __init__(self, home: Path, environ: dict[str, str], *, stored: bool) -> None:
        self.store_of_descriptors: DescriptorStore | None = None
        home.mkdir(exist_ok=True)
        if stored:
            self.store_of_descriptors = DescriptorStore(home / "systemd")
        super().__init__(home, environ)

    def start(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        keeping = self.store_of_descriptors
        if keeping is None or name != "packfs":
            started: subprocess.Popen[bytes] = super().start(name, *flags)
            return started
        argv, environ, passed = keeping.command([sys.executable, "-m", "floe", name, *flags])
        keeping.expect_ready()
        try:
            with self.log(name).open("ab") as output:
                process = subprocess.Popen(
                    argv, env={**self.environ, **environ}, stdout=output, stderr=output, pass_fds=passed
                )
        finally:
            for fd in passed:
                os.close(fd)
        end = time.monotonic() + 3 * START_TIME
        while process.poll() is None and time.monotonic() < end:
            if keeping.is_ready(0.2):
                return process
        raise AssertionError(f"floe {name} did not start:\n{self.log(name).read_text()[-3000:]}")

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.store_of_descriptors:
                self.store_of_descriptors.close()


class World:
    """Everything running; `close` takes it down and raises what went wrong in that."""

    def __init__(self, base: Path, version: Version, seed: int, *, stored: bool, settings: dict[str, str]) -> None:
        self.base, self.stored = base, stored
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.seaweed = Seaweed(base / "seaweed")
            stack.callback(self.seaweed.stop)
            self.line = Line(("127.0.0.1", urlsplit(self.seaweed.endpoint).port or 0), seed)
            stack.callback(self.line.close)
            self.redis = RedisServer(base / "redis")
            stack.callback(self.redis.stop)
            self.registry = BlobHost()
            stack.callback(self.registry.close)
            self.bucket = self.seaweed.bucket()
            self.cache = base / "cache"
            self._make_cache_disk(stack)
            environ = {
                **self.seaweed.environment(),
                "FLOE_STORE": self.seaweed.url(self.bucket, endpoint=f"http://{self.line.address}"),
                "FLOE_INDEX": self.redis.url(),
                "FLOE_STORE_TIMEOUT": "60",
                "FLOE_CACHE_DIR": str(self.cache),
                "FLOE_CACHE_SIZE": str(CACHE_SIZE),
                "FLOE_CACHE_MIN_FREE": "0",
                "FLOE_READAHEAD": "8MiB",
                "FLOE_SPOOL_DIR": str(base / "spool"),
                **settings,
            }
            self.node = Node(base / "h", environ, stored=stored)
            self.packfs = PackfsClient(self.node.run_dir)
            stack.callback(self.node.close)
            self.containerd = Containerd(
                version,
                base,
                snapshotter_address=self.node.address,
                snapshotter_root=self.node.root,
                registries=(self.registry.address,),
                annotations=True,
            )
            stack.callback(self.containerd.stop)
            stack.callback(self.answer)
            self.cri: Cri = self.containerd.cri()
            self.cri.timeout = 60
            self.snapshots = SnapshotsClient(self.node.address, namespace="k8s.io")
            stack.callback(self.snapshots.close)
            self._stack = stack.pop_all()

    def _make_cache_disk(self, stack: contextlib.ExitStack) -> None:
        image = self.base / "cache.img"
        with image.open("wb") as file:
            file.truncate(CACHE_DISK)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        self.cache.mkdir()
        subprocess.run(["mount", "-o", "loop", str(image), str(self.cache)], check=True)
        stack.callback(subprocess.run, ["umount", str(self.cache)], check=True)
        self.cache_image = image

    # what is there

    def command(self, *words: object, kill_after: float | None = None) -> subprocess.CompletedProcess[str]:
        """`floe WORDS`; with `kill_after` killed with -9 after so many seconds, should it run that long."""
        argv = [sys.executable, "-m", "floe", *map(str, words)]
        process = subprocess.Popen(
            argv,
            env=self.node.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=kill_after or _COMMAND_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            if kill_after is None:
                raise AssertionError(f"floe {' '.join(map(str, words))} took over {_COMMAND_TIME:g} s: {err}") from None
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def pid(self, name: str) -> int:
        """The process id in keeper.pid or worker.pid; 0 when there is none."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.node.run_dir / f"{name}.pid").read_text())
        return 0

    def serving(self) -> int:
        """The worker's process id; 0 while none answers."""
        with contextlib.suppress(UnavailableError):
            return self.packfs.ping()
        return 0

    def answer(self) -> None:
        """Have every read answered, whatever the run left: containers and trees cannot go before."""
        self.line.clear()
        if not self.serving():
            with contextlib.suppress(AssertionError):  # a keeper may be there, and starts its worker in a moment
                self.node.packfs = self.node.start("packfs")
        with contextlib.suppress(UnavailableError, AssertionError):
            until(lambda: not self.packfs.status()["inflight"], 60)

    def close(self) -> None:
        self._stack.close()
