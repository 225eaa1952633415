"""python -m bench.hot_layout: what laying out an image's hot files together saves at its next start.

A layer of many small incompressible files in a bucket behind 20 ms, of which a start reads 200 that lie scattered, in an
order of its own. Each start is on a node that holds nothing, and mounts the layer through the snapshotter. Compared are: no
profile; the profile of such a start; and the same profile after `floe image index --profile`. Told are the requests and bytes
of packs that the node had from the store, the seconds from Prepare until all files were read, and what the layout cost.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import command, servers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import grpc
from support.floe_daemons import Daemons
from support.images import build_oci, files
from support.snapshots import REF, mounted

from floe.protos.packfs_control import PackfsClient

KINDS = NONE, PROFILE, LAID_OUT = "no profile", "profile", "profile, laid out"
FIGURES = REQUESTS, BYTES, SECONDS = "requests", "MiB", "seconds"
MIB = 1 << 20


def main() -> int:
    """Build the image, measure, print."""
    options = _options()
    with (
        command.folder(options.dir) as work,
        servers.s3(work) as s3,
        servers.slowed(s3, latency=options.latency / 1000) as endpoint,
    ):
        store = {"FLOE_STORE": s3.url(s3.bucket(), "hot", endpoint=endpoint), "FLOE_INDEX": "none"}
        found = _Starts(work, {**s3.environment(), **store}, options).measure()
    command.show(options, found, "\n".join(_lines(found, options.rounds)))
    return 0


def _lines(found: dict[str, Any], rounds: int) -> Iterator[str]:
    yield f"{'medians of ' + str(rounds):20}" + "".join(f"{name:>12}" for name in FIGURES)
    for kind in KINDS:
        cells = [statistics.median(found[kind][name]) for name in FIGURES]
        yield f"{kind:20}" + "".join(f"{cell:12.2f}" for cell in cells)
    yield f"touched: {found['touched']:.2f} MiB; stored once more for the layout: {found['copied']:.2f} MiB"


def _options() -> argparse.Namespace:
    parser = command.parser("hot_layout", __doc__, rounds=5, free="5 GiB")
    parser.add_argument("--files", type=int, default=8000, help="files of the layer, of 1 to 32 KiB (default 8000)")
    parser.add_argument("--hot", type=int, default=200, help="files that a start reads (default 200)")
    parser.add_argument("--latency", type=float, default=20.0, help="added to the store's answers, in ms (default 20)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it needs root")
    return options


class _Starts:
    def __init__(self, work: Path, store: dict[str, str], options: argparse.Namespace) -> None:
        self._work, self._store, self._options = work, store, options
        source = random.Random(1)
        content = {
            f"d{number % 97:02}/f{number:05}": source.randbytes(source.randrange(1 << 10, 32 << 10))
            for number in range(options.files)
        }
        names = list(content)
        self._hot = names[:: max(1, len(names) // options.hot)][: options.hot]
        source.shuffle(self._hot)
        self._touched = sum(len(content[name]) for name in self._hot)
        self._image = build_oci(work / "app", [files(content)], tag="1", compression="none")

    def measure(self) -> dict:
        """Figures by kind; sizes in MiB."""
        found: dict = {kind: {name: [] for name in FIGURES} for kind in KINDS}
        self._index()
        for number in range(self._options.rounds):
            self._start(f"none{number}", found[NONE], "off")
        self._start("recording", {name: [] for name in FIGURES}, "on")
        for number in range(self._options.rounds):
            self._start(f"profile{number}", found[PROFILE], "read")
        copied = self._index("--profile")["copied_bytes"]
        for number in range(self._options.rounds):
            self._start(f"out{number}", found[LAID_OUT], "read")
        return {**found, "touched": self._touched / MIB, "copied": copied / MIB}

    def _index(self, *flags: str) -> dict:
        environ = {**os.environ, **self._store, "FLOE_CACHE_DIR": str(self._work / "cache")}
        command = [sys.executable, "-m", "floe", "--config=", "image", "index", "--json", *flags, self._image.source]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def _start(self, name: str, figures: dict[str, list[float]], profiles: str) -> None:
        home = self._work / name
        daemons = Daemons(home, {**self._store, "FLOE_PROFILES": profiles})
        try:
            begun = time.perf_counter()
            try:
                daemons.client.prepare("extract", "", {REF: self._image.diff_ids[0]})
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
            (layer,) = daemons.client.list(f'labels."{REF}"=={self._image.diff_ids[0]}')
            with mounted(daemons.client.view("start", layer.name), home) as root:
                for path in self._hot:
                    (root / path).read_bytes()
                figures[SECONDS].append(time.perf_counter() - begun)
            counters = PackfsClient(daemons.run_dir).status()["counters"]
            figures[REQUESTS].append(counters["store_requests"] + counters["readahead_requests"])
            figures[BYTES].append((counters["store_bytes"] + counters["readahead_bytes"]) / MIB)
            daemons.client.remove("start")
        finally:
            daemons.close()
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
