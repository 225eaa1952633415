"""A container that reads uncached data from a slow S3 store: an image layer's and an attached model's at once.

Everything is real: SeaweedFS behind a slow proxy, both daemons, containerd, a registry. `read` starts the container,
`finish` speeds the store up and checks what it read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from support import seaweed
from support.blobhost import BlobHost
from support.containerd import Containerd, Version
from support.floe_daemons import Daemons
from support.images import build_oci, busybox, files
from support.mounts import until
from support.slow_proxy import SlowProxy

from floe.protos.packfs_control import PackfsClient
from floe.store.errors import UnavailableError

MIB = 1 << 20
SLOW = 6 * MIB  # bytes a second of the store
LATENCY = 0.05
MODEL, LAYER = "/models/demo/weights.bin", "/data/big"
# Both are read at once; the sums come last, so that they are lost with nobody who might be killed meanwhile.
SCRIPT = f"md5sum {MODEL} >/tmp/m & a=$!; md5sum {LAYER} >/tmp/l & b=$!; wait $a || exit 3; wait $b || exit 4; cat /tmp/m /tmp/l"


class SlowNode:
    """`daemons`, `cri`, `proxy` and `containerd` for the faults; `close` takes everything down and checks nothing."""

    def __init__(
        self,
        base: Path,
        version: Version,
        *,
        model: int = 48 * MIB,
        layer: int = 24 * MIB,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            server = seaweed.running()
            self.proxy = SlowProxy(("127.0.0.1", urlsplit(server.endpoint).port or 0))
            stack.callback(self.proxy.close)
            store = server.url(server.bucket(), endpoint=f"http://{self.proxy.address}")
            environ = {
                **server.environment(),
                "FLOE_STORE": store,
                "FLOE_STORE_TIMEOUT": "30",
                "FLOE_PREFETCH_AT_PREPARE": "0",  # what the container reads is to come from the store
                **(environ or {}),
            }
            self.daemons = Daemons(base / "h", environ)
            self.packfs = PackfsClient(self.daemons.run_dir)
            stack.callback(self.daemons.close)
            stack.callback(self.answer)
            registry = BlobHost()
            stack.callback(registry.close)
            self.reference = self._make_image(base, registry, os.urandom(model), os.urandom(layer))
            self.containerd = Containerd(
                version,
                base,
                snapshotter_address=self.daemons.address,
                snapshotter_root=self.daemons.root,
                registries=(registry.address,),
            )
            stack.callback(self.containerd.stop)
            stack.callback(self.answer)
            self.cri = self.containerd.cri()
            self.cri.pull(self.reference)
            self._stack = stack.pop_all()

    def _make_image(self, base: Path, registry: BlobHost, weights: bytes, big: bytes) -> str:
        self.sums = [hashlib.md5(weights).hexdigest(), hashlib.md5(big).hexdigest()]
        (base / "model").mkdir()
        (base / "model" / "weights.bin").write_bytes(weights)
        image = build_oci(base / "image", [busybox(), files({LAYER.lstrip("/"): big})], tag="1", compression="")
        self.daemons.floe("model", "push", base / "model", "demo:1")
        self.daemons.floe("image", "index", image.source)
        self.daemons.floe("image", "attach", image.source, f"oci:{base}/attached:1", "--model", "demo:1=/models/demo")
        return registry.add_layout(base / "attached", "1", "attached")

    # the store's speed

    def slow(self) -> None:
        self.proxy.latency, self.proxy.rate = LATENCY, SLOW

    def fast(self) -> None:
        self.proxy.latency, self.proxy.rate = 0.0, None
        self.proxy.go()

    def answer(self) -> None:
        """Have the reads answered that a failed test left: containers and trees cannot go before."""
        self.fast()
        if not self.serving():
            self.daemons.packfs = self.daemons.start("packfs")
        with contextlib.suppress(UnavailableError):
            until(lambda: not self.packfs.status()["inflight"], 30)

    # reading

    def read(self) -> str:
        """Start the container, over a slow store, and wait until its reads wait for fetches; its id."""
        pod = self.cri.run_pod(f"reader-{time.monotonic_ns()}")
        self.slow()
        container = self.cri.run_container(pod, self.reference, ["sh", "-c", SCRIPT])
        self.wait_inflight()
        return container

    def finish(self, container: str) -> None:
        """No read failed and all bytes are the original's."""
        self.fast()
        code = self.cri.wait(container, 60)
        assert code == 0, f"exit code {code}: a read failed"
        until(lambda: len(self.cri.logs(container).splitlines()) >= 2)
        assert [line.split()[0] for line in self.cri.logs(container).splitlines()] == self.sums

    def packs(self) -> list[str]:
        known = (self.daemons.run_dir / "packs.known").read_text().splitlines()
        return [line.split()[0] for line in known]

    def inflight(self) -> int:
        """Reads the worker has taken and not answered: each waits for a fetch. 0 while no worker answers."""
        with contextlib.suppress(UnavailableError):
            return self.packfs.inflight(self.packs())
        return 0

    def wait_inflight(self) -> None:
        until(self.inflight, 30)

    # faults; each demands that fetches are in flight

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """With reads waiting for the store, which answers none: else a slow machine has read all before the last fault."""
        self.proxy.hold()
        try:
            self.wait_inflight()
            yield
        finally:
            self.proxy.go()

    def pid(self, name: str) -> int:
        """The process id in keeper.pid or worker.pid."""
        return int((self.daemons.run_dir / name).read_text())

    def kill_worker(self) -> None:
        """kill -9 of the worker; returns when its successor has answered what was left, if anything was."""
        before = self.packfs.status()
        with self.held():
            old = self.pid("worker.pid")
            os.kill(old, signal.SIGKILL)
        until(lambda: self.serving() not in (0, old), 30)
        if self.packfs.status()["takeovers"] > before["takeovers"]:
            until(lambda: self.packfs.status()["replayers"] > before["replayers"], 30)

    def serving(self) -> int:
        """The worker's process id; 0 while none answers."""
        with contextlib.suppress(UnavailableError):
            return self.packfs.ping()
        return 0

    def kill_keeper(self) -> None:
        """kill -9 of the keeper, and `floe packfs` again, as systemd does it."""
        with self.held():
            self.daemons.packfs.kill()
            self.daemons.packfs.wait()
            self.wait_inflight()
            self.daemons.packfs = self.daemons.start("packfs")

    def kill_snapshotter(self) -> None:
        with self.held():
            self.daemons.restart_snapshotter()

    def kill_containerd(self) -> None:
        with self.held():
            self.containerd.kill()
            self.containerd.start()
            until(self.cri.ready, 30)

    def close(self) -> None:
        self._stack.close()
