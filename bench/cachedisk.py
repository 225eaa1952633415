"""python -m bench.cachedisk: a cache disk slower than the store, with and without going around it; and two disks beside one.

The disks are slow by design: ext4 on loop devices over a file whose server makes each read wait 30 ms (a network boot disk), or gives
60 MB/s in all. The bucket is on loopback. What is read is held by the cache and not in any page cache; of the first part some is
not held, since what is complete would be mounted natively. Subjects take turns within a round.
"""

import os
import random
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import command, servers
from bench.floe_node import FloeNode
from bench.report import percentile
from bench.residency import push
from bench.servers import SlowDisk, drop_page_cache, slow_disk

MIB = 1 << 20
DELAY, RATE = 0.030, 60e6  # seconds of a read, bytes a second of a disk
SIZE, HELD = 160, 128  # MiB of the model, and of what the node holds of it
MODELS, EACH = 12, 8  # models over one and two disks, MiB
SUBJECTS = ("auto", "never")


def main() -> int:
    """Measure and print."""
    options = command.parser("cachedisk", __doc__, rounds=3, free="4 GiB").parse_args()
    with command.folder(options.dir) as work, ExitStack() as stack:
        s3 = stack.enter_context(servers.s3(work))
        environ = {**s3.environment(), "FLOE_STORE": s3.url(s3.bucket(), uuid.uuid4().hex)}
        found = {"slow": _slow(work, environ, options.rounds), "disks": _disks(work, environ, options.rounds)}
    command.show(options, found, "\n".join(_lines(found)))
    return 0


# a slow disk


def _slow(work: Path, environ: dict[str, str], rounds: int) -> dict[str, Any]:
    """By subject the rate of a sequential reader (bytes a second), and seconds of random reads of 4 KiB."""
    with ExitStack() as stack:
        readers = {name: stack.enter_context(_slow_node(work, environ, name)) for name in SUBJECTS}
        found: dict[str, dict[str, list[float]]] = {name: {"rates": [], "medians": [], "p99s": []} for name in readers}
        for _ in range(rounds):
            for name, (disk, file) in readers.items():
                found[name]["rates"].append(_stream(disk, file))
                seconds = _random_reads(disk, file)
                found[name]["medians"].append(statistics.median(seconds))
                found[name]["p99s"].append(percentile(seconds, 0.99))
    return found


@contextmanager
def _slow_node(work: Path, environ: dict[str, str], bypass: str) -> Iterator[tuple[SlowDisk, Path]]:
    """A node whose cache holds most of a model, on a slow disk; with `auto` it has found out already."""
    with slow_disk(work / f"disk-{bypass}", 2 * SIZE * MIB) as disk:
        node = FloeNode(work, bypass, {**environ, "FLOE_CACHE_BYPASS": bypass})
        node.cache = disk.path / "cache"
        node.env["FLOE_CACHE_DIR"] = str(node.cache)
        if bypass == SUBJECTS[0]:
            push(node, node.model, SIZE)
        with node.mounted() as folder:
            file = folder / "weights"
            _read(file, HELD * MIB, step=MIB // 2, random_access=True)
            _wait(lambda: node.status()["packfs"]["counters"]["kept_held_bytes"] >= HELD * MIB)
            disk.set(DELAY)
            if bypass == "auto":
                _wait(lambda: (_random_reads(disk, file), _is_bypassed(node))[1])
            yield disk, file
            disk.set(0.0)


def _is_bypassed(node: FloeNode) -> bool:
    (directory,) = node.status()["cache"]["directories"]
    return bool(directory["bypass"]["bypassed"])


def _stream(disk: SlowDisk, file: Path) -> float:
    _drop(disk, file)
    begun = time.perf_counter()
    _read(file, HELD * MIB)
    return HELD * MIB / (time.perf_counter() - begun)


def _random_reads(disk: SlowDisk, file: Path) -> list[float]:
    """Seconds of each, one in a MiB."""
    _drop(disk, file)
    numbers = list(range(HELD))
    random.Random("order").shuffle(numbers)
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    seconds = []
    for number in numbers:
        begun = time.perf_counter()
        os.pread(fd, 4096, number * MIB + 4096)
        seconds.append(time.perf_counter() - begun)
    os.close(fd)
    return seconds


def _drop(disk: SlowDisk, file: Path) -> None:
    drop_page_cache(disk.path / "cache")
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _read(file: Path, size: int, step: int = MIB, *, random_access: bool = False) -> None:
    fd = os.open(file, os.O_RDONLY)
    if random_access:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for offset in range(0, size, step):
        os.pread(fd, step if not random_access else 4096, offset)
    os.close(fd)


# several disks


def _disks(work: Path, environ: dict[str, str], rounds: int) -> dict[str, Any]:
    """By the number of disks the rates of reading all models at once, complete and natively mounted, and models on each."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        nodes = {count: stack.enter_context(_group_node(work, environ, count)) for count in (1, 2)}
        for count, (disks, _) in nodes.items():
            counts = [sum(1 for _ in disk.path.glob("cache/packs/*/complete")) for disk in disks]
            found[str(count)] = {"models": counts, "rates": []}
        for _ in range(rounds):
            for count, (disks, files) in nodes.items():
                for file in files:
                    _drop(disks[0], file)
                for disk in disks:
                    drop_page_cache(disk.path / "cache")
                begun = time.perf_counter()
                with ThreadPoolExecutor(len(files)) as pool:
                    list(pool.map(lambda file: _read(file, EACH * MIB), files))
                found[str(count)]["rates"].append(MODELS * EACH * MIB / (time.perf_counter() - begun))
    return found


@contextmanager
def _group_node(work: Path, environ: dict[str, str], count: int) -> Iterator[tuple[list[SlowDisk], list[Path]]]:
    with ExitStack() as stack:
        disks = [
            stack.enter_context(slow_disk(work / f"disk-{number}-of-{count}", 3 * MODELS * EACH * MIB))
            for number in range(count)
        ]
        node = FloeNode(work, f"on-{count}", environ)
        first, *more = [str(disk.path / "cache") for disk in disks]
        node.env |= {"FLOE_CACHE_DIR": first, "FLOE_CACHE_DIRS": ":".join(more) or "none"}
        names = [f"model-{number}" for number in range(MODELS)]
        places = [node.home / f"mnt-{name}" for name in names]
        for name, place in zip(names, places, strict=True):
            if count == 1:
                push(node, name, EACH)
            node.floe("model", "mount", name, place)
            stack.callback(node.floe, "umount", place)
            _read(place / "weights", EACH * MIB)
        _wait(lambda: node.status()["cache"]["complete_packs"] == MODELS)
        for name, place in zip(names, places, strict=True):
            node.floe("umount", place)
            node.floe("model", "mount", name, place)
        assert {mount["mode"] for mount in node.status()["mounts"]} == {"native"}
        for disk in disks:
            disk.set(0.0, RATE)
        yield disks, [place / "weights" for place in places]
        for disk in disks:
            disk.set(0.0)


def _wait(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            raise SystemExit("bench: the cache did not come to the state that is measured")
        time.sleep(0.1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"a cache disk whose reads wait {DELAY * 1e3:.0f} ms, the store on loopback"
    for name, seen in found["slow"].items():
        rate, middle, p99 = (statistics.median(seen[key]) for key in ("rates", "medians", "p99s"))
        yield f"  cache_bypass {name:<6} {rate / 1e6:7.1f} MB/s in sequence, 4 KiB at random: median {middle * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms"
    yield f"{MODELS} models read at once, resident, from disks of {RATE / 1e6:.0f} MB/s"
    for count, seen in found["disks"].items():
        rate = statistics.median(seen["rates"])
        yield f"  directories {count:<6} {rate / 1e6:7.1f} MB/s, models on each: {', '.join(map(str, seen['models']))}"


if __name__ == "__main__":
    sys.exit(main())
