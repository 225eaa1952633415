"""python -m bench.overlap: how much earlier a model is on a node because its fetch begins with the pull of its image.

An image with a layer of many files, incompressible and not indexed, carries a model in a bucket behind 20 ms and a line of 200
MB/s. In interleaved rounds, with the setting `prefetch_at_prepare` and with 0, on nodes that hold nothing, containerd
pulls the image through CRI, and a container reads the model. Told are the seconds from the pull's
begin until containerd has pulled, until the model's first GiB is in the node cache, and until the container has read all of it; and
what was in the cache when the pull ended.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import command, servers
from bench.native import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.blobhost import BlobHost
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.images import add, build_oci, busybox

from floe.protos.packfs_control import PackfsClient

MIB, FILE = 1 << 20, 8 << 10
WITH, WITHOUT = "with", "without"
DIRECT = "direct"
PATH = "/models/weights"
PULLED, RESIDENT, READ, AT_PULL = "pulled", "GiB resident", "model read", "MiB resident when pulled"


def main() -> int:
    """Make image and model, measure, print."""
    options = _options()
    with command.folder(options.dir) as work, servers.s3(work) as s3, _registry() as registry:
        bucket = s3.bucket()
        with servers.slowed(s3, latency=options.latency / 1000, rate=options.rate * 1e6) as endpoint:
            slow = s3.url(bucket, "overlap", endpoint=endpoint)
            store = {"FLOE_STORE": slow, "FLOE_INDEX": "none", DIRECT: s3.url(bucket, "overlap")}
            found = _Overlap(work, {**s3.environment(), **store}, registry, options).measure()
    command.show(options, found, "\n".join(_lines(found, options.rounds)))
    return 0


def _lines(found: dict[str, Any], rounds: int) -> Iterator[str]:
    yield f"{'':28}{WITH:>10}{WITHOUT:>10}   (medians of {rounds}, seconds unless said)"
    for name in (PULLED, RESIDENT, READ, AT_PULL):
        cells = [statistics.median(found[kind][name]) for kind in (WITH, WITHOUT)]
        yield f"{name:28}" + "".join(f"{cell:10.2f}" for cell in cells)


def _options() -> argparse.Namespace:
    parser = command.parser("overlap", __doc__, rounds=5, free="10 GiB")
    parser.add_argument("--files", type=int, default=40_000, help="files of 8 KiB in the layer (default 40000)")
    parser.add_argument("--size", type=int, default=1024, help="size of the model in MiB (default 1024)")
    parser.add_argument("--latency", type=float, default=20.0, help="added to the store's answers, in ms (default 20)")
    parser.add_argument("--rate", type=float, default=200.0, help="MB/s of the line to the store (default 200)")
    options = parser.parse_args()
    if os.geteuid() != 0 or not versions():
        parser.error("it needs root and a containerd: run install/setup.sh test")
    return options


@contextmanager
def _registry() -> Iterator[BlobHost]:
    host = BlobHost()
    try:
        yield host
    finally:
        host.close()


class _Overlap:
    def __init__(self, work: Path, store: dict[str, str], registry: BlobHost, options: argparse.Namespace) -> None:
        self._work, self._store, self._options = work, store, options
        self._direct = store.pop(DIRECT)
        self._registry = registry
        self._reference = self._build()

    def _build(self) -> str:
        model = self._work / "model"
        model.mkdir()
        _fill(model / "weights.bin", self._options.size, 1)
        source = random.Random(2).randbytes(MIB)

        def large(tar) -> None:  # type: ignore[no-untyped-def]
            for number in range(self._options.files):
                add(tar, f"data/{number % 100}/{number}", source[number : number + FILE])

        image = build_oci(self._work / "image", [busybox(), large], tag="1")
        environ = {**os.environ, **self._store, "FLOE_STORE": self._direct, "FLOE_CACHE_DIR": str(self._work / "cache")}
        floe = (sys.executable, "-m", "floe")
        run(*floe, "--config=", "model", "push", model, "weights:1", env=environ)
        target = f"oci:{self._work}/attached:1"
        run(*floe, "--config=", "image", "attach", image.source, target, "--model", f"weights:1={PATH}", env=environ)
        shutil.rmtree(model)
        return self._registry.add_layout(self._work / "attached", "1", "app")

    def measure(self) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {
            kind: {name: [] for name in (PULLED, RESIDENT, READ, AT_PULL)} for kind in (WITH, WITHOUT)
        }
        for number in range(self._options.rounds):
            for kind in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
                for name, value in self._round(kind, f"{kind}{number}").items():
                    found[kind][name].append(value)
        return found

    def _round(self, kind: str, name: str) -> dict[str, float]:
        home = self._work / name
        home.mkdir()
        size = f"{self._options.size}MiB" if kind == WITH else "0"
        daemons = Daemons(home / "h", {**self._store, "FLOE_PROFILES": "off", "FLOE_PREFETCH_AT_PREPARE": size})
        daemon = Containerd(
            versions()[-1],
            home,
            snapshotter_address=daemons.address,
            snapshotter_root=daemons.root,
            registries=(self._registry.address,),
        )
        try:
            return self._start(daemon, PackfsClient(daemons.run_dir))
        finally:
            daemon.stop()
            daemons.close()
            shutil.rmtree(home, ignore_errors=True)

    def _start(self, daemon: Containerd, packfs: PackfsClient) -> dict[str, float]:
        cri = daemon.cri()
        cri.timeout = 600
        pod = cri.run_pod("bench")
        wanted, resident = min(self._options.size, 1024) * MIB, list[float]()
        begun = time.perf_counter()

        def watch() -> None:
            while not resident:
                if _held(packfs) >= wanted:
                    resident.append(time.perf_counter() - begun)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        cri.pull(self._reference)
        pulled, at_pull = time.perf_counter() - begun, _held(packfs) / MIB
        # By cat and the whole of it: busybox's head reads byte by byte, and would be what is measured.
        command = ["sh", "-c", f"cat {PATH}/weights.bin > /dev/null"]
        code, text = cri.run(pod, self._reference, command)
        read = time.perf_counter() - begun
        if code:
            raise SystemExit(f"bench: the container failed: {text}")
        watcher.join(60)
        return {PULLED: pulled, RESIDENT: resident[0], READ: read, AT_PULL: at_pull}


def _held(packfs: PackfsClient) -> int:
    """Bytes of content that were written to the node cache."""
    return int(packfs.status()["counters"]["kept_stored_bytes"])


def _fill(path: Path, mib: int, seed: int) -> None:
    """Incompressible, and without a chunk that occurs twice."""
    with path.open("wb") as file:
        source = random.Random(seed)
        for _ in range(mib):
            file.write(source.randbytes(MIB))


if __name__ == "__main__":
    sys.exit(main())
