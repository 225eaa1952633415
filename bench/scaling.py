"""python -m bench.scaling: what 1, 100 and 10,000 nodes ask when they start one image or model at once, and what saturates.

The model is arithmetic over what one node asks, which follows from the layers and packs of what it starts and from reads
that were counted on a real node. `--check` starts real nodes here (needs root), one and some at once, and fails when what
they asked differs from the model by more than the tolerance. docs/SCALING.md explains the figures.
"""

import argparse
import heapq
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench import command

MIB = 1 << 20
NODES = (1, 100, 10_000)
META = ("floe.json", "refs/models", "manifests", "trees", "indexes", "profiles/trees", "profiles/sources")


@dataclass(frozen=True)
class Start:
    """What is started. `layers`: trees, each with one pack; a model is one. `reads`: ranged GETs of packs, `hot_reads` of
    the pack that gets most. `bytes`: of all answers. `known`: its start-up profile is in the store.
    """  # fmt: skip

    name: str
    layers: int
    reads: int
    hot_reads: int
    bytes: int
    known: bool
    image: bool = True
    tolerance: float = 0.25  # of requests to packs and of bytes: which reads meet depends on the moment

    def asked(self) -> dict[str, int]:
        """Requests to the store by kind that one node makes until its program runs; what it tells afterwards left out."""
        n = self.layers
        return {
            "floe.json": 2,  # by each process that opens the store
            "refs/models": 0 if self.image else 1,
            "manifests": n,
            "trees": n,
            "indexes": n,
            "profiles/trees": n,
            "profiles/sources": 0 if self.known else n,
            "packs": self.reads,
        }

    @property
    def redis(self) -> int:
        """Commands: a chain and a layer for each layer of an image; a model's name is looked up in the bucket."""
        return 2 * self.layers if self.image else 0

    @property
    def registry(self) -> int:
        """Requests of containerd: the tag, the manifest, the configuration. No layer."""
        return 3 if self.image else 0


@dataclass(frozen=True)
class Limits:
    """What the world gives. Rates a second; `bucket` and `nic` in bytes. `first_byte`: seconds of any GET.

    5,500 GETs a second for each partitioned prefix are what AWS documents for S3. The others are assumptions, to be
    replaced by your own: flags of this command set them.
    """

    gets: float = 5500.0
    partitions: bool = False  # whether S3 has split the prefixes of the packs already; until then all share one
    bucket: float = 100e9 / 8
    nic: float = 10e9 / 8
    redis: float = 100_000.0
    registry: float = 1000.0
    first_byte: float = 0.02
    at_once: int = 16


@dataclass(frozen=True)
class Outcome:
    """All nodes together. `seconds`: until the last has all it reads. `busy`: by resource, seconds that its work takes."""

    nodes: int
    requests: int
    redis: int
    registry: int
    bytes: int
    seconds: float
    busy: dict[str, float]

    @property
    def saturated(self) -> str:
        """The resource with most work; "latency" when none has as much as the round trips take."""
        name, most = max(self.busy.items(), key=lambda item: item[1])
        return name if most >= self.seconds / 2 else "latency"


def simulate(start: Start, nodes: int, limits: Limits) -> Outcome:
    """All nodes begin at 0; each goes through its stages, each resource serves in the order of arrival. Deterministic.

    A lower bound: S3 answers 503 where this waits, and clients come back later than at the first moment possible.
    """
    asked = start.asked()
    total = sum(asked.values())
    stages: list[tuple[str, int, float]] = [
        ("registry", start.registry, 1 / limits.registry),
        ("redis", start.redis, 1 / limits.redis),
        *(("meta GETs", asked[kind], 1 / limits.gets) for kind in META if asked[kind]),
    ]
    # In one partition the packs' reads queue with everything else; in several each pack has a queue of its own.
    hot = start.hot_reads if limits.partitions else start.reads
    packs = "GETs of the hottest pack" if limits.partitions else "meta GETs"
    rounds = -(-start.reads // limits.at_once)
    stages += [(packs, -(-hot // rounds), 1 / limits.gets)] * rounds
    free: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    heap = [(0.0, node, 0) for node in range(nodes)]
    last = 0.0
    while heap:
        now, node, number = heapq.heappop(heap)
        if number == len(stages):
            last = max(last, now)
            continue
        resource, count, each = stages[number]
        begun = max(now, free[resource])
        free[resource] = begun + count * each
        busy[resource] += count * each
        sent = start.bytes / rounds if number >= len(stages) - rounds else 0.0
        done = free[resource]
        if sent:
            on_line = max(done, free["bucket bandwidth"]) + sent / limits.bucket
            free["bucket bandwidth"] = on_line
            busy["bucket bandwidth"] += sent / limits.bucket
            done = max(on_line, done + sent / limits.nic)
        heapq.heappush(heap, (done + (limits.first_byte if count else 0.0), node, number + 1))
    busy["a node's interface"] = start.bytes / limits.nic
    named = {("GETs of one partition" if name == "meta GETs" else name): value for name, value in busy.items()}
    return Outcome(nodes, total * nodes, start.redis * nodes, start.registry * nodes, start.bytes * nodes, last, named)


def saturates_from(start: Start, limits: Limits, seconds: float) -> tuple[str, int]:
    """The resource that first has more work than `seconds`, as nodes grow, and how many nodes that takes."""
    one = simulate(start, 1, limits).busy
    name, work = max(((n, w) for n, w in one.items() if n != "a node's interface"), key=lambda item: item[1])
    return name, int(seconds / work) + 1


def compare(start: Start, nodes: int, asked: dict[str, int], moved: int, redis: int, registry: int) -> list[str]:
    """What real `nodes` asked against the model: a line for each figure that is off, none when it holds."""
    off = []
    expected = {kind: count * nodes for kind, count in start.asked().items()}
    for kind, count in expected.items():
        near = count * start.tolerance if kind == "packs" else 0
        if abs(asked.get(kind, 0) - count) > near:
            off.append(f"{kind}: {asked.get(kind, 0)} requests, the model says {count}")
    if abs(moved - start.bytes * nodes) > start.bytes * nodes * start.tolerance:
        off.append(f"bytes: {moved}, the model says {start.bytes * nodes}")
    for name, found, wanted in (
        ("redis", redis, start.redis * nodes),
        ("registry", registry, start.registry * nodes),
    ):
        if found != wanted:
            off.append(f"{name}: {found} requests, the model says {wanted}")
    return off


def show(starts: tuple[Start, ...], limits: Limits) -> None:
    """Print a table for each start."""
    for start in starts:
        print(f"\n{start.name}\n")
        print("| nodes | store requests | Redis commands | registry requests | GB | seconds | saturated |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for nodes in NODES:
            o = simulate(start, nodes, limits)
            cells = (f"{o.nodes:,}", f"{o.requests:,}", f"{o.redis:,}", f"{o.registry:,}", f"{o.bytes / 1e9:,.2f}")
            print(f"| {' | '.join(cells)} | {o.seconds:.1f} | {o.saturated} |")
        name, nodes = saturates_from(start, limits, 10.0)
        print(f"\nwith {nodes:,} nodes, {name} is the first to have more than 10 s of work")


# Reads and bytes as counted on one node of docs/SCALING.md's run.
# Without a profile, how far read-ahead gets before the program ends moves the bytes: between 49 and 84 MB in four runs.
IMAGE_FIRST = Start("image, first start anywhere", 3, 117, 59, 67_000_000, known=False, tolerance=0.4)
IMAGE = Start("image, with a start-up profile", 3, 59, 27, 19_187_224, known=True)
MODEL_FIRST = Start(
    "model of 256 MiB, read whole, first start anywhere", 1, 46, 46, 270_179_332, known=False, image=False
)
MODEL = Start("model of 256 MiB, read whole, with a start-up profile", 1, 65, 65, 270_193_034, known=True, image=False)
STARTS = (IMAGE_FIRST, IMAGE, MODEL_FIRST, MODEL)


def check(work: Path, several: int) -> list[str]:
    """Start real nodes, one and `several` at once, and compare; what is off."""
    from bench import fleet  # noqa: PLC0415 - servers and containerd, for this alone

    off = []
    with fleet.running(work) as real:
        real.index_image()
        real.push_model(256 * MIB)
        for start, count, record in ((IMAGE_FIRST, 1, True), (IMAGE, 1, False), (IMAGE, several, False)):
            off += _compared(start, real.start_image(count, record=record))
        off += _compared(MODEL_FIRST, real.start_model(1, record=True))
        off += _compared(MODEL, real.start_model(several, record=False))
    return off


def _compared(start: Start, found) -> list[str]:
    # What a node tells of its start comes after it: its puts, and the look before each of them.
    told = Counter(one.kind for one in found.before_telling)
    moved = sum(one.bytes for one in found.before_telling if one.action.startswith("GET"))
    print(
        f"{start.name}: {found.nodes} real: {dict(told)}, {moved} bytes, Redis {found.redis}, registry {found.registry}"
    )
    off = compare(start, found.nodes, told, moved, found.redis, found.registry)
    return [f"{start.name}, {found.nodes} nodes: {line}" for line in off]


def main() -> int:
    """Simulate, or check the model against real nodes."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="start real nodes here and compare; needs root")
    parser.add_argument("--several", type=int, default=3, help="real nodes at once (3)")
    parser.add_argument("--partitions", action="store_true", help="S3 has split the prefixes of the packs already")
    for name in ("gets", "bucket", "nic", "redis", "registry", "first-byte"):
        default = getattr(Limits, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, help=f"({default:g})")
    options = parser.parse_args()
    if not options.check:
        rates = (options.gets, options.partitions, options.bucket, options.nic, options.redis, options.registry)
        show(STARTS, Limits(*rates, options.first_byte))
        return 0
    with command.folder(Path("/var/tmp")) as work:
        off = check(work, options.several)
    for line in off:
        print(f"off: {line}")
    print(f"the model is off in {len(off)} figures" if off else "the model holds")
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
