"""Real nodes on this machine that start one image or one model, with everything they ask counted where it arrives.

A SeaweedFS behind a front that notes each request, a Redis, a registry; for each node a containerd, Floe's daemons and an
empty cache of its own. Needs root and what install/setup.sh test installs.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import scale_image
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.floe_node import Node, wait_until
from support.redis_server import RedisServer
from support.registry import Registry
from support.s3gate import S3Gate
from support.seaweed import ACCESS_KEY, Seaweed

from bench import data, servers
from bench.native import run
from floe.protos.packfs_control import PackfsClient

PREFIX = "fleet"
MODEL = "bench:1"
_CONNECTING = {"auth", "hello", "ping", "command", "cluster|slots", "client|setinfo"}  # once a connection, not a start
_SETTLE = 20.0  # seconds, more than a start's longest silence


@dataclass(frozen=True)
class Asked:
    """One request to the store: `kind` is the first part of its key (two of refs and profiles), `bytes` of body."""

    action: str
    kind: str
    key: str
    bytes: int


class Front(S3Gate):
    """Notes what passes; `take` returns it and starts anew."""

    def __init__(self, weed: Seaweed) -> None:
        self._asked: list[Asked] = []
        self._noting = threading.Lock()
        super().__init__(weed, {ACCESS_KEY: None})

    def answer(self, request):
        """Pass on, and note what came back."""
        reply = super().answer(request)
        _, _, key = request.path.removeprefix("/").partition("/")
        key = key.removeprefix(f"{PREFIX}/")
        parts = key.split("/")
        kind = "/".join(parts[:2]) if parts[0] in ("refs", "profiles") else parts[0]
        moved = len(request.body) if request.method == "PUT" else len(reply.body)
        with self._noting:
            self._asked.append(Asked(f"{request.method} {reply.status}", kind, key, moved))
        return reply

    def take(self) -> list[Asked]:
        """What was asked since the last call."""
        with self._noting:
            asked, self._asked = self._asked, []
        return asked


@dataclass(frozen=True)
class Counted:
    """What `nodes` starts asked, in all; `before_telling` without what they told of their starts afterwards. `seconds`: of the slowest, from the pull to the program's output."""

    nodes: int
    asked: tuple[Asked, ...]
    before_telling: tuple[Asked, ...]
    redis: int
    registry: int
    seconds: float


class Fleet:
    """The servers, and the image and model in the store; `start_image` and `start_model` start nodes."""

    def __init__(self, work: Path, stack: contextlib.ExitStack) -> None:
        self.work = work
        self._nodes = 0
        self.weed = stack.enter_context(servers.s3(work))
        self.front = Front(self.weed)
        stack.callback(self.front.close)
        self.redis = RedisServer(work / "redis")
        stack.callback(self.redis.stop)
        self.registry = Registry(work / "registry")
        stack.callback(self.registry.stop)
        self.bucket = self.weed.bucket()
        common = {**self.weed.environment(), "FLOE_INDEX": self.redis.url()}
        self.environ = {**common, "FLOE_STORE": self.front.address(self.bucket, PREFIX, path_style="true")}
        home = work / "admin"
        home.mkdir()
        self.admin = Node(home)
        self.admin.environ |= {**common, "FLOE_STORE": self.weed.url(self.bucket, PREFIX)}
        self.admin.environ["FLOE_STORE_TIMEOUT"] = "30"

    def index_image(self) -> int:
        """Make an image of 500 MiB and 20,000 files, and index it; its number of layers."""
        made = scale_image.build(self.work / "image")
        self.reference = self.registry.push(made.built.source, "app:1")
        self._floe("image", "index", "--plain-http", self.reference)
        return len(made.built.layers)

    def push_model(self, size: int) -> None:
        """A model of one file of `size` bytes and two hundred small ones."""
        folder = self.work / "weights"
        data.make(folder, large=size, files=200)
        self._floe("model", "push", str(folder), MODEL)

    def start_image(self, count: int, *, record: bool) -> Counted:
        """`count` new nodes pull the image and run its program, at once. `record`: until they told what they read."""
        with contextlib.ExitStack() as stack:
            machines = [self._machine(stack, containerd=True) for _ in range(count)]
            cris = [machine.containerd.cri() for machine in machines]

            def start(cri) -> None:
                cri.pull(self.reference)
                code, text = cri.run(cri.run_pod("app"), self.reference, [])
                if code != 0:
                    raise SystemExit(f"bench: the container failed: {text}")

            return self._count(machines, lambda: _at_once(start, cris), record=record)

    def start_model(self, count: int, *, record: bool) -> Counted:
        """`count` new nodes mount the model and read all of it, at once."""
        with contextlib.ExitStack() as stack:
            machines = [self._machine(stack, containerd=False) for _ in range(count)]

            def start(machine: "Machine") -> None:
                place = machine.node.home / "mnt"
                machine.node.floe("model", "mount", MODEL, place)
                stack.callback(machine.node.floe, "umount", place)
                run("sh", "-c", f"find {place} -type f -exec cat {{}} + > /dev/null")

            return self._count(machines, lambda: _at_once(start, machines), record=record)

    def _count(self, machines, work, *, record: bool) -> Counted:
        self.front.settle()
        self.front.take()
        self.redis.forget_calls()
        before = len(self.registry.requests())
        begun = time.monotonic()
        work()
        seconds = time.monotonic() - begun
        for machine in machines:
            wait_until(machine.is_quiet, _SETTLE)  # start-up profiles are read to their end
        self.front.settle()
        before_telling = tuple(self.front.take())
        for machine in machines if record else ():
            machine.tell()
        self.front.settle()
        calls = sum(n for name, n in self.redis.calls().items() if name not in _CONNECTING)
        registry = len(self.registry.requests()) - before
        return Counted(len(machines), (*before_telling, *self.front.take()), before_telling, calls, registry, seconds)

    def _machine(self, stack: contextlib.ExitStack, *, containerd: bool) -> "Machine":
        self._nodes += 1
        base = self.work / f"n{self._nodes}"
        base.mkdir()
        machine = Machine(base, self.environ, self.registry if containerd else None)
        stack.callback(machine.close)
        return machine

    def _floe(self, *words: str) -> None:
        run(sys.executable, "-m", "floe", *words, env=self.admin.environ)


class Machine:
    """A node with an empty cache. With a registry: Floe's daemons, and a containerd that pulls through them."""

    def __init__(self, base: Path, environ: dict[str, str], registry: Registry | None) -> None:
        with contextlib.ExitStack() as stack:
            self.containerd = None
            if registry is None:
                home = base / "h"
                home.mkdir()
                self.node = Node(home)
                self.node.environ |= environ
                stack.callback(self.node.clean_up)
            else:
                self.node = daemons = Daemons(base / "h", environ)
                stack.callback(daemons.close)
                self.containerd = Containerd(
                    versions()[-1],
                    base,
                    snapshotter_address=daemons.address,
                    snapshotter_root=daemons.root,
                    registries=(registry.host,),
                )
                stack.callback(self.containerd.stop)
            self.close = stack.pop_all().close

    def is_quiet(self) -> bool:
        """Whether the worker has nothing on its way."""
        # Not by `floe status`, which asks the index too.
        return not PackfsClient(self.node.run_dir).status()["counters"]["memory_bytes"]

    def tell(self) -> None:
        """Have the worker end in good order: it writes down in the store what was read first."""
        pid = int((self.node.run_dir / "worker.pid").read_text())
        fd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGTERM)
            if not select.select([fd], [], [], _SETTLE)[0]:
                raise SystemExit("bench: the worker did not end")
        finally:
            os.close(fd)


def _at_once(work, items) -> None:
    with ThreadPoolExecutor(len(items)) as threads:
        for done in [threads.submit(work, item) for item in items]:
            done.result()


@contextlib.contextmanager
def running(work: Path) -> Iterator[Fleet]:
    """A fleet's servers in the folder `work`, stopped afterwards."""
    with contextlib.ExitStack() as stack:
        yield Fleet(work, stack)
