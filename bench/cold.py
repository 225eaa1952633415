"""python -m bench.cold: what a first read from the bucket costs, with nothing on the node, beside the same bytes by other ways.

In interleaved rounds of one run, each subject on an empty page cache:

- `first read`: one file of 1 GiB from S3 on loopback, until it is read, until the node cache holds it, and until it is
  synced there; and the processor time of it. Against parallel ranged GETs by obstore into a file on the same disk.
- `far`: the same, and the load of its tensors by safetensors' mmap, through a proxy that puts a round trip of 20 ms and
  90 MB/s for each connection between node and server, as S3 has them. Against 32 connections of ranged GETs.
- `random`: reads of 4 KiB here and there in that file through the same proxy, one after another.
- `small`: 20,000 small files, one after another, from loopback and through the proxy, against the download of the packs
  they lie in; and once more when the node cache holds them, which is what opening and reading them takes by itself.
- `proxy`: what the proxy itself can pass when it neither waits nor caps.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from bench import command, cpu, data, peers, servers, throttle, workloads
from bench.floe_node import FloeNode
from bench.report import Results, percentile
from floe.store import layout

MIB = 1 << 20
TENSORS = 16
LARGE = "large.bin"  # a safetensors file: read as bytes, at random and as tensors
BLOCK = 4096
FLOE, HELD, JUICE, GETS = "floe", "floe, once held", "juicefs", "ranged GETs"
GROUPS = ("first read", "far", "random", "small", "proxy")
_LIMIT = 30.0  # seconds for the cache to hold what was read


def main() -> int:
    """Make the data, measure, print."""
    options = _options()
    return command.run(options, lambda stack, work: _Cold(stack, work, options).measure())


def _options() -> argparse.Namespace:
    parser = command.parser("cold", __doc__, rounds=5, free="15 GiB")
    parser.add_argument("--only", choices=GROUPS, action="append", help="measure these alone")
    parser.add_argument("--size", type=int, default=1024, help="size of the large file in MiB (default 1024)")
    parser.add_argument("--files", type=int, default=20_000, help="number of small files (default 20000)")
    parser.add_argument("--reads", type=int, default=100, help="random reads in a round (default 100)")
    parser.add_argument("--delay", type=float, default=throttle.DELAY, help="round trip in seconds (default 0.020)")
    parser.add_argument(
        "--rate", type=float, default=throttle.RATE, help="bytes a second and connection (default 90e6)"
    )
    parser.add_argument("--connections", type=int, default=32, help="of the ranged GETs through the proxy (default 32)")
    parser.add_argument("--no-juicefs", action="store_true", help="leave JuiceFS out")
    options = parser.parse_args()
    options.only = options.only or list(GROUPS)
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    return options


class _Cold:
    """One run: the servers, the data in the bucket, the subjects."""

    def __init__(self, stack: ExitStack, work: Path, options: argparse.Namespace) -> None:
        self._stack, self._work, self._options = stack, work, options
        self._results = Results(facts={"cores": os.cpu_count(), "large file MiB": options.size})
        self._s3 = stack.enter_context(servers.s3(work))
        self._bucket = self._s3.bucket()
        self._juice: peers.JuiceFS | None = None

    def measure(self) -> Results:
        """Every group that was asked for."""
        only = self._options.only
        if {"first read", "far", "random", "proxy"} & set(only):
            self._store_large()
        far = self._stack.enter_context(
            throttle.running(self._host(self._s3.endpoint), delay=self._options.delay, rate=self._options.rate)
        )
        self._results.facts["proxy"] = (
            f"{self._options.delay * 1000:g} ms, {self._options.rate / 1e6:g} MB/s a connection"
        )
        self._far = f"http://{far}"
        measures: dict[str, Callable[[], None]] = {
            "first read": self._first_read,
            "far": self._far_reads,
            "random": self._random,
            "small": self._small,
            "proxy": self._proxy,
        }
        for name in only:
            command.say(name)
            measures[name]()
        return self._results

    # what is measured

    def _first_read(self) -> None:
        node, gets = self._node("near", self._s3.endpoint, "large"), self._gets(self._s3.endpoint, peers.CONNECTIONS)
        titles = {
            "read": "first read, until it is read",
            "held": "first read, until the cache holds it",
            "synced": "first read, until it is synced",
            "processes": "first read, processor seconds per GB: of its processes",
            "machine": "first read, processor seconds per GB: of the machine but the server",
        }
        rows: dict[str, list[dict[str, float]]] = {key: [] for key in titles}
        for _ in range(self._options.rounds):
            for kept in rows.values():
                kept.append({})
            node.cold_mount()
            pids = [node.pid("keeper"), node.pid("worker")]
            self._take(rows, FLOE, pids, lambda: self._until_held(node))
            node.umount()
            self._take(rows, GETS, [], lambda: dict.fromkeys(("read", "held"), gets.fetch(LARGE)))
            workloads.empty_page_cache()
            rows["synced"][-1][GETS] = gets.fetch(LARGE, sync=True)
            if juice := self._juice:
                juice.cold_mount()
                workloads.empty_page_cache()
                rows["read"][-1][JUICE] = _read(juice.mountpoint)
                juice.umount()
        for key, title in titles.items():
            self._results.add(title, rows[key], GETS)

    def _take(
        self, rows: dict[str, list[dict[str, float]]], name: str, pids: list[int], run: Callable[[], dict[str, float]]
    ) -> None:
        """Run one subject on an empty page cache; its seconds and its processor time go into the last of the rows."""
        workloads.empty_page_cache()
        found: dict[str, float] = {}
        processes, machine = cpu.spent(lambda: found.update(run()), pids, [self._s3.pid])
        gigabytes = self._options.size * MIB / 1e9
        found |= {"processes": processes / gigabytes, "machine": machine / gigabytes}
        for key, value in found.items():
            rows[key][-1][name] = value

    def _until_held(self, node: FloeNode) -> dict[str, float]:
        begun = time.perf_counter()
        _read(node.mountpoint)
        found = {"read": time.perf_counter() - begun}
        for key, reached in (("held", node.holds_all), ("synced", node.is_complete)):
            while not reached():
                if time.perf_counter() - begun > _LIMIT:
                    counters = node.status()["packfs"]["counters"]
                    raise SystemExit(f"bench: {_LIMIT:g} s after the read the cache is not {key}: {counters}")
                time.sleep(0.005)
            found[key] = time.perf_counter() - begun
        return found

    def _far_reads(self) -> None:
        self._far_rounds("far read", _read)
        self._far_rounds("far load by safetensors (mmap)", _load)

    def _far_rounds(self, title: str, work: Callable[[Path], float]) -> None:
        node, gets = self._node("far", self._far, "large"), self._gets(self._far, self._options.connections)
        rows = []
        for _ in range(self._options.rounds):
            row = {}
            node.cold_mount()
            workloads.empty_page_cache()
            row[FLOE] = work(node.mountpoint)
            node.umount()
            workloads.empty_page_cache()
            row[GETS] = gets.fetch(LARGE)
            if juice := self._juice:
                juice.cold_mount(f"{self._far}/{self._juice_bucket}")
                workloads.empty_page_cache()
                row[JUICE] = work(juice.mountpoint)
                juice.umount()
            rows.append(row)
        self._results.add(title, rows, GETS)

    def _random(self) -> None:
        node, gets = self._node("random", self._far, "large"), self._gets(self._far, 1)
        source = random.Random(4)
        middles, slowest = [], []
        for _ in range(self._options.rounds):
            blocks = self._options.size * MIB // BLOCK
            offsets = [block * BLOCK for block in source.sample(range(blocks), self._options.reads)]
            found = {}
            node.cold_mount()
            workloads.empty_page_cache()
            found[FLOE] = _random_reads(node.mountpoint / LARGE, offsets)
            node.umount()
            gets.random(LARGE, offsets[:1], BLOCK)  # connects
            found[GETS] = gets.random(LARGE, offsets, BLOCK)
            if juice := self._juice:
                juice.cold_mount(f"{self._far}/{self._juice_bucket}")
                workloads.empty_page_cache()
                found[JUICE] = _random_reads(juice.mountpoint / LARGE, offsets)
                juice.umount()
            middles.append({name: statistics.median(seconds) for name, seconds in found.items()})
            slowest.append({name: percentile(seconds, 0.99) for name, seconds in found.items()})
        self._results.add("random 4 KiB reads, median", middles, GETS)
        self._results.add("random 4 KiB reads, p99", slowest, GETS)
        if self._options.delay:
            self._results.facts["random 4 KiB reads in round trips, median and p99"] = {
                name: [
                    round(statistics.median(row[name] for row in rows) / self._options.delay, 2)
                    for rows in (middles, slowest)
                ]
                for name in middles[0]
            }

    def _small(self) -> None:
        folder = self._work / "small-data"
        data.make(folder, large=0, files=self._options.files)
        (folder / LARGE).unlink()
        self._node("small-push", self._s3.endpoint, "small").push(folder)
        for title, endpoint, connections in (
            ("small files", self._s3.endpoint, peers.CONNECTIONS),
            ("far small files", self._far, self._options.connections),
        ):
            node, gets = self._node(title.replace(" ", "-"), endpoint, "small"), self._gets(endpoint, connections)
            rows = []
            for _ in range(self._options.rounds):
                row = {}
                node.cold_mount()
                packs = [f"bench/{layout.pack_key(pack)}" for pack in node.packs()]
                workloads.empty_page_cache()
                row[FLOE] = workloads.read_small(node.mountpoint)
                workloads.empty_page_cache()
                row[HELD] = workloads.read_small(node.mountpoint)
                node.umount()
                workloads.empty_page_cache()
                row[GETS] = gets.fetch(*packs)
                rows.append(row)
            self._results.add(title, rows, GETS)

    def _proxy(self) -> None:
        rows = []
        with throttle.running(self._host(self._s3.endpoint), delay=0, rate=None) as wide_open:
            straight = self._gets(self._s3.endpoint, self._options.connections)
            through = self._gets(f"http://{wide_open}", self._options.connections)
            for _ in range(self._options.rounds):
                row = {}
                for name, gets in ((GETS, straight), ("through the proxy", through)):
                    workloads.empty_page_cache()
                    row[name] = gets.fetch(LARGE)
                rows.append(row)
        self._results.add("the proxy, neither waiting nor capping", rows, GETS)

    # what it is measured with

    def _store_large(self) -> None:
        command.say("making the large file")
        folder = self._work / "large-data"
        folder.mkdir()
        source = np.random.default_rng(20261124)
        tensors = {
            f"layer.{n:02d}": np.frombuffer(source.bytes(self._options.size * MIB // TENSORS), dtype=np.float16)
            for n in range(TENSORS)
        }
        save_file(tensors, folder / LARGE)
        del tensors
        self._node("large-push", self._s3.endpoint, "large").push(folder)
        self._gets(self._s3.endpoint, 1).put(LARGE, folder / LARGE)
        if not self._options.no_juicefs:
            redis = self._stack.enter_context(servers.redis(self._work))
            self._juice_bucket = self._s3.bucket()
            self._juice = peers.JuiceFS(self._work, redis, f"{self._s3.endpoint}/{self._juice_bucket}", servers.KEYS)
            self._stack.callback(self._juice.umount)
            self._juice.mount()
            self._juice.fill(folder)
            self._juice.umount()
        shutil.rmtree(folder)

    def _node(self, name: str, endpoint: str, model: str) -> FloeNode:
        number = sum(1 for _ in self._work.glob("floe-*"))
        url = self._s3.url(self._bucket, "bench", endpoint=endpoint)
        node = FloeNode(self._work, f"{number}-{name}", {**self._s3.environment(), "FLOE_STORE": url}, model)
        self._stack.callback(node.umount)
        return node

    def _gets(self, endpoint: str, connections: int) -> peers.RangedGets:
        return peers.RangedGets(self._work, peers.s3_config(self._bucket, endpoint, servers.KEYS), connections)

    @staticmethod
    def _host(endpoint: str) -> str:
        return endpoint.rpartition("/")[2]


def _read(folder: Path) -> float:
    """`cat` of the large file: a process of its own, so that this one's lock is not in its way."""
    begun = time.perf_counter()
    subprocess.run(["cat", str(folder / LARGE)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _load(folder: Path) -> float:
    begun = time.perf_counter()
    tensors = load_file(folder / LARGE)
    taken = time.perf_counter() - begun
    assert len(tensors) == TENSORS
    return taken


def _random_reads(path: Path, offsets: list[int]) -> list[float]:
    seconds = []
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # these bytes and no more: the kernel reads nothing ahead
        for offset in offsets:
            begun = time.perf_counter()
            assert len(os.pread(file, BLOCK, offset)) == BLOCK
            seconds.append(time.perf_counter() - begun)
    finally:
        os.close(file)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
