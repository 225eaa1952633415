"""python -m bench.residency: how much longer demand reads wait while another model is completed at full rate.

Two models in a bucket on loopback. Random 4 KiB reads of the first one, each in a frame that is not here yet, are timed one by one:
alone, and while the second, larger one is completed in the background (`completion = "always"`, no rate). Cold caches each time, in
interleaved rounds. A round in which the fill ended before the reads did says so, since its end was measured without a load.
"""

import contextlib
import os
import random
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import command, servers
from bench.floe_node import FloeNode
from floe.protos.packfs_control import PackfsClient

MIB = 1 << 20
DEMAND, FILL = "demand", "fill"
POLICY = f'[[model_policy]]\nname = "{FILL}"\ncompletion = "always"\n'


def main() -> int:
    """Push both models, measure, print."""
    parser = command.parser("residency", __doc__, rounds=5, free="10 GiB")
    parser.add_argument("--reads", type=int, default=300, help="reads in a round, one in a MiB (300)")
    parser.add_argument("--fill", type=int, default=4096, help="MiB of the model that is completed (4096)")
    options = parser.parse_args()
    with command.folder(options.dir) as work, servers.s3(work) as s3:
        environ = {**s3.environment(), "FLOE_STORE": s3.url(s3.bucket(), uuid.uuid4().hex)}
        node = FloeNode(work, "residency", environ)
        for name, size in ((DEMAND, options.reads), (FILL, options.fill)):
            push(node, name, size)
        rounds = [(_measure(node, options.reads, loaded=False), _measure(node, options.reads, loaded=True))
                  for _ in range(options.rounds)]  # fmt: skip
    found = _summary(rounds)
    command.show(options, found, "\n".join(_lines(found)))
    return 0


def push(node: FloeNode, name: str, size: int) -> None:
    """Store a model of `size` random MiB in one file, `weights`."""
    folder = node.home / name
    folder.mkdir()
    source = random.Random(name)
    with (folder / "weights").open("wb") as out:
        for _ in range(size):
            out.write(source.randbytes(MIB))
    node.floe("model", "push", folder, name)
    shutil.rmtree(folder)


def _measure(node: FloeNode, reads: int, *, loaded: bool) -> dict[str, Any]:
    """Seconds of each read, and the rate of the fill meanwhile in bytes a second."""
    for folder in (node.cache, node.run_dir):
        shutil.rmtree(folder, ignore_errors=True)
    (node.home / "config.toml").write_text(POLICY if loaded else "")
    mounts = {DEMAND: node.home / "demand-mnt", **({FILL: node.home / "fill-mnt"} if loaded else {})}
    client = PackfsClient(node.run_dir)
    with contextlib.ExitStack() as stack:
        for name, place in mounts.items():
            node.floe("model", "mount", name, place)
            stack.callback(node.floe, "umount", place)
        while loaded and not client.status()["counters"]["completion_bytes"]:
            time.sleep(0.05)
        before, begun = client.status()["counters"]["completion_bytes"], time.perf_counter()
        seconds = _read(mounts[DEMAND] / "weights", reads)
        filled = client.status()["counters"]["completion_bytes"] - before
        running = client.status()["completion"]["running"]
        rate = filled / (time.perf_counter() - begun)
    return {"seconds": seconds, "fill_rate": rate, "fill_ended": loaded and not running}


def _read(path: Path, reads: int) -> list[float]:
    places = list(range(reads))
    random.Random(reads).shuffle(places)
    seconds = []
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for place in places:
            begun = time.perf_counter()
            if len(os.pread(fd, 4096, place * MIB + 512 * 1024)) != 4096:
                raise SystemExit("bench: a read was short")
            seconds.append(time.perf_counter() - begun)
    finally:
        os.close(fd)
    return seconds


def _summary(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    p50s, p99s = ([[_quantile(half["seconds"], q) for half in pair] for pair in rounds] for q in (0.5, 0.99))
    return {
        "rounds": len(rounds),
        "alone": {"p50": statistics.median(p[0] for p in p50s), "p99": statistics.median(p[0] for p in p99s)},
        "beside_fill": {"p50": statistics.median(p[1] for p in p50s), "p99": statistics.median(p[1] for p in p99s)},
        "p99_ratios": [loaded / alone for alone, loaded in p99s],
        "fill_bytes_per_second": statistics.median(loaded["fill_rate"] for _, loaded in rounds),
        "fill_ended_early": sum(loaded["fill_ended"] for _, loaded in rounds),
    }


def _quantile(seconds: list[float], q: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * q))]


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for name in ("alone", "beside_fill"):
        yield f"{name:12} p50 {found[name]['p50'] * 1e3:8.2f} ms   p99 {found[name]['p99'] * 1e3:8.2f} ms"
    ratios = ", ".join(f"{ratio:.1f}" for ratio in found["p99_ratios"])
    yield f"p99 to alone, by round: {ratios}; the fill ran at {found['fill_bytes_per_second'] / MIB:.0f} MiB/s meanwhile"
    if found["fill_ended_early"]:
        yield f"in {found['fill_ended_early']} of {found['rounds']} rounds the fill ended first: give a larger --fill"


if __name__ == "__main__":
    sys.exit(main())
