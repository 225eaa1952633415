"""python -m bench.seeding: what indexers do for each core, what a container notices of its node seeding an image, and memory.

Indexers (processes, one image at a time each) empty a queue of images of random content, out of a registry into an S3 server; processor
time is theirs alone. Then a container counts how often it gets through a fixed piece of work, in spells without and with `floe seed`
beside it, which gives an image that the node has just unpacked to the same S3 server. Registry, Redis and S3 server share the machine:
what they take counts against the container, too, and is told beside what `floe seed` and containerd, which reads for it, take.
"""

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import command, cpu, servers
from bench.floe_node import peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import pushing
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.floe_node import Node, wait_until
from support.images import build_oci, busybox, files
from support.redis_server import RedisServer
from support.registry import Registry

MIB = 1 << 20
# Reads and hashes what lies in the page cache, and says how often.
WORK = "n=0; end=$(($(date +%s) + {seconds})); while [ $(date +%s) -lt $end ]; do md5sum /data/work >/dev/null; n=$((n+1)); done; echo $n"


def main() -> int:
    """Measure, print."""
    options = _options()
    with command.folder(options.dir) as work, contextlib.ExitStack() as stack:
        world = _World(work, stack)
        parts: dict[str, Callable[[], Any]] = {
            "indexers": lambda: [world.index(options, count) for count in (1, 2)],
            "container": lambda: world.beside(options),
            "memory": world.memory,
        }
        found = {name: part() for name, part in parts.items() if options.only in (None, name)}
    command.show(options, found, "\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for one in found.get("indexers", ()):
        yield (
            f"{one['indexers']} indexers: {one['images'] / one['seconds']:.2f} images/s, {one['mib'] / one['seconds']:.1f} MiB/s; "
            f"{one['mib'] / one['cpu_seconds']:.1f} MiB and {one['images'] / one['cpu_seconds']:.2f} images for each second of a core"
        )
    if container := found.get("container"):
        alone, beside = (statistics.median(container[kind]) for kind in ("alone", "beside"))
        yield (
            f"a container's work in {container['spell']} s, {container['busy']} processes: {alone:.0f} alone, {beside:.0f} beside "
            f"seeding: {100 * (1 - beside / alone):.1f} % less"
        )
        shares = {name: statistics.median(one[name] for one in container["shares"]) for name in container["shares"][0]}
        yield "of all processors meanwhile: " + ", ".join(
            f"{name} {100 * share:.1f} %" for name, share in shares.items()
        )
        yield (
            f"seeding: {container['seeded']} images seeded, at {container['rate']}; {container['throughout']} of them lasted longer "
            "than the spell beside them"
        )
    if memory := found.get("memory"):
        yield (
            f"floe agent: {memory['before_mib']:.0f} MiB before it seeds, {memory['peak_mib']:.0f} MiB at most while it seeds "
            f"{memory['layers_mib']:.0f} MiB of layers (gzip) with {memory['files']} files, at no bound, in {memory['seconds']:.0f} s"
        )


def _options() -> argparse.Namespace:
    parser = command.parser("seeding", __doc__, rounds=5, free="10 GiB")
    parser.add_argument("--only", choices=("indexers", "container", "memory"), help="this part alone")
    parser.add_argument("--images", type=int, default=40, help="that indexers find in the queue (default 40)")
    parser.add_argument("--size", type=int, default=8, help="MiB of each of them (default 8)")
    parser.add_argument(
        "--spell", type=int, default=10, help="seconds of each measurement of the container (default 10)"
    )
    parser.add_argument(
        "--busy",
        type=int,
        default=1,
        help="processes of the container that work (default 1); as many as cores is the hardest",
    )
    parser.add_argument("--rate", default="32MiB", help="seed_rate (default 32MiB)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it needs root")
    return options


class _World:
    def __init__(self, work: Path, stack: contextlib.ExitStack) -> None:
        self._work, self._stack = work, stack
        self._weed = stack.enter_context(servers.s3(work))
        self._redis = RedisServer(work / "redis")
        stack.callback(self._redis.stop)
        self._registry = Registry(work / "registry")
        stack.callback(self._registry.stop)
        self._hosts = pushing.without_tls(work / "hosts", self._registry.host)
        self._random = random.Random(1)

    def index(self, options: argparse.Namespace, indexers: int) -> dict[str, Any]:
        """Let so many indexers empty a queue; sizes in MiB, times in seconds."""
        node = self._node(f"indexers-{indexers}")
        for number in range(options.images):
            content = files({"data": self._random.randbytes(options.size * MIB), "n": f"{indexers} {number}"})
            image = build_oci(self._work / f"image-{indexers}-{number}", [content], compression="none")
            name = pushing.push(image, self._registry.host, f"bench{indexers}/app{number}:1")
            node.floe("image", "index", "--queue", name)
        log = self._work / "indexers.log"
        began, seconds = time.monotonic(), 0.0
        workers = [
            pushing.start_indexer({**node.environ, "FLOE_SPOOL_DIR": str(node.home / f"spool-{number}")}, log, "--once")
            for number in range(indexers)
        ]
        spent = dict.fromkeys((worker.pid for worker in workers), 0.0)
        while any(worker.poll() is None for worker in workers):
            for pid in spent:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    spent[pid] = cpu.of_processes([pid])
            time.sleep(0.05)
        seconds = time.monotonic() - began
        counts = node.json("indexer", "status")["counts"]
        if counts.get("done") != options.images:
            raise SystemExit(f"bench: not all images were indexed: {counts}\n{log.read_text()[-2000:]}")
        mib = options.images * options.size
        return {
            "indexers": indexers,
            "images": options.images,
            "mib": mib,
            "seconds": seconds,
            "cpu_seconds": sum(spent.values()),
        }

    def beside(self, options: argparse.Namespace) -> dict[str, Any]:
        """How often a container gets through its work, alone and beside seeding, in turns."""
        daemons, containerd = self._machine("seeding")
        cri = containerd.cri()
        worker = build_oci(self._work / "worker", [busybox(applets=("sh", "md5sum", "date", "sleep", "true")),
                           files({"data/work": self._random.randbytes(4 * MIB)})])  # fmt: skip
        name = pushing.push(worker, self._registry.host, "worker:1")
        cri.pull(name)
        container = cri.run_container(cri.run_pod("worker"), name, ["sleep", "100000"])
        found: dict[str, Any] = {"alone": [], "beside": [], "spell": options.spell, "rate": options.rate}
        found |= {"busy": options.busy, "seeded": 0, "throughout": 0, "shares": []}
        for number in range(options.rounds):
            # More than a spell's worth at this rate, so that seeding lasts longer than the spell.
            size = max(64, options.spell * 48)
            image = build_oci(
                self._work / f"seeded-{number}",
                [files({f"data/{n}": self._random.randbytes(MIB) for n in range(size)})],
                compression="none",
            )
            pulled = pushing.push(image, self._registry.host, f"seeded/app{number}:1")
            shutil.rmtree(image.directory)
            cri.pull(pulled)
            found["alone"].append(self._spell(cri, container, options))
            seeding = self._seed(daemons, containerd, options)
            try:
                time.sleep(2)  # it has found the image, and reads
                groups = {"seed": [seeding.pid], "containerd": [containerd.process.pid], "servers": self._servers()}
                before = {name: cpu.of_processes(pids) for name, pids in groups.items()}
                found["beside"].append(self._spell(cri, container, options))
                taken = {name: cpu.of_processes(pids) - before[name] for name, pids in groups.items()}
                found["shares"].append(
                    {name: took / options.spell / len(os.sched_getaffinity(0)) for name, took in taken.items()}
                )
                found["throughout"] += pulled not in daemons.floe("image", "ls").stdout
                wait_until(lambda: pulled in daemons.floe("image", "ls").stdout, seconds=300)  # noqa: B023 - called at once
                found["seeded"] += 1
            finally:
                seeding.terminate()
                seeding.wait()
            cri.remove_image(pulled)
        return found

    def memory(self) -> dict[str, Any]:
        """The most that an agent takes while it seeds: large files, many small ones, and text, in layers of some 500 MB as they are pulled."""
        daemons, containerd = self._machine("memory")
        text = b" ".join(b"%d" % self._random.randrange(10**6) for _ in range(150_000))
        layers = [
            {f"large/{n}": self._random.randbytes(8 * MIB) for n in range(32)},
            {f"small/{n % 100}/{n}": self._random.randbytes(6000) for n in range(30_000)},
            {f"text/{n}": text[n:] for n in range(100)},
        ]
        image = build_oci(self._work / "large", [files(layer) for layer in layers], compression="gzip")
        pulled = pushing.push(image, self._registry.host, "seeded/large:1")
        containerd.cri().pull(pulled)
        began = time.monotonic()
        agent = daemons.start("agent", *self._flags(daemons, containerd, "none"))
        before = peak_memory(agent.pid) / MIB
        try:
            until = time.monotonic() + 600
            while pulled not in daemons.floe("image", "ls").stdout:
                if time.monotonic() > until:
                    raise SystemExit(f"bench: it was not seeded\n{daemons.log('agent').read_text()[-2000:]}")
                time.sleep(0.5)
            peak = peak_memory(agent.pid) / MIB
        finally:
            agent.terminate()
            agent.wait()
        return {
            "before_mib": before,
            "peak_mib": peak,
            "layers_mib": sum(layer["size"] for layer in image.layers) / MIB,
            "files": sum(map(len, layers)),
            "seconds": time.monotonic() - began,
        }

    def _machine(self, name: str) -> tuple[Daemons, Containerd]:
        node = self._node(name)
        # Directories are the daemons' own.
        shared = {key: node.environ[key] for key in (*self._weed.environment(), "FLOE_STORE", "FLOE_INDEX")}
        base = self._work / f"{name}-containerd"
        base.mkdir()
        daemons = Daemons(self._work / f"{name}-h", shared)
        self._stack.callback(daemons.close)
        containerd = Containerd(
            versions()[-1], base, snapshotter_address=daemons.address, snapshotter_root=daemons.root,
            registries=(self._registry.host,),
        )  # fmt: skip
        self._stack.callback(containerd.stop)
        return daemons, containerd

    def _flags(self, daemons: Daemons, containerd: Containerd, rate: str) -> list[str]:
        policy = f'[{{name = "{self._registry.host}/seeded/*"}}]'
        flags = ["--seed", "all", "--seed-rate", rate, "--image-policy", policy]
        return [*flags, "--containerd-socket", str(containerd.address), "--address", str(daemons.address)]

    def _seed(self, daemons: Daemons, containerd: Containerd, options: argparse.Namespace) -> subprocess.Popen[bytes]:
        flags = self._flags(daemons, containerd, options.rate)
        with (self._work / "seed.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "floe", "seed", *flags], env=daemons.environ, stdout=log, stderr=log
            )

    def _servers(self) -> list[int]:
        """What would be on other machines: the S3 server, Redis, the registry."""
        return [self._weed.pid, self._redis.process.pid, self._registry.process.pid]

    @staticmethod
    def _spell(cri: Any, container: str, options: argparse.Namespace) -> int:
        work = " ".join([f"({WORK.format(seconds=options.spell)}) &"] * options.busy)
        code, out, err = cri.execute(container, "sh", "-c", f"{work} wait", timeout=options.spell + 60)
        if code:
            raise SystemExit(f"bench: the container failed: {err.decode()}")
        return sum(map(int, out.split()))

    def _node(self, name: str) -> Node:
        home = self._work / name
        home.mkdir()
        node = Node(home)
        node.environ |= self._weed.environment() | {
            "FLOE_STORE": self._weed.url(self._weed.bucket(), name),
            "FLOE_INDEX": self._redis.url(),
            "FLOE_REGISTRY_CONFIG": ":".join(map(str, self._hosts)),
            "FLOE_STORE_TIMEOUT": "30",
        }
        node.floe("store", "init")
        return node


if __name__ == "__main__":
    sys.exit(main())
