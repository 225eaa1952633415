"""python -m bench.gil: how much of the time, while a node reads, its worker holds Python's lock, and where.

py-spy looks at the worker 250 times a second, once for who holds the lock and once for all threads that run, while the
model is read from S3 on loopback, and from far away (20 ms, 90 MB/s a connection), for the first time and again:

- `large`: one file of 1 GiB by `cat`; `small`: 20,000 files of some 8 KiB, one after another.

Told are, for each, the share of the reading during which the lock was held, how many threads were running on average
(with the lock, or in code that releases it), and the functions that held the lock longest. A share far below 1 says that
the lock binds nothing; a share near 1 says that another worker would help.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import command, data, servers, throttle, workloads
from bench.floe_node import FloeNode

MIB = 1 << 20
RATE = 250  # looks a second
TOP = 6
_WAIT = 10.0  # seconds for py-spy to begin and to end


def main() -> int:
    """Make the data, read and look, print."""
    options = _options()
    with command.folder(options.dir) as work, ExitStack() as stack:
        found = _Gil(stack, work, options).measure()
    command.show(options, found, "\n".join(_lines(found)))
    return 0


def _options() -> argparse.Namespace:
    parser = command.parser("gil", __doc__, rounds=3, free="8 GiB")
    parser.add_argument("--size", type=int, default=1024, help="size of the large file in MiB (default 1024)")
    parser.add_argument("--files", type=int, default=20_000, help="number of small files (default 20000)")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    if shutil.which("py-spy", path=_PATH) is None:
        parser.error("py-spy is not here: run install/setup.sh bench")
    return options


_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"


class _Gil:
    def __init__(self, stack: ExitStack, work: Path, options: argparse.Namespace) -> None:
        self._work, self._options = work, options
        s3 = stack.enter_context(servers.s3(work))
        bucket = s3.bucket()
        host = s3.endpoint.rpartition("/")[2]
        far = f"http://{stack.enter_context(throttle.running(host, delay=throttle.DELAY, rate=throttle.RATE))}"
        source = work / "data"
        data.make(source, large=options.size * MIB, files=options.files)
        self._nodes = {}
        for place, endpoint in (("near", s3.endpoint), ("far", far)):
            environ = {**s3.environment(), "FLOE_STORE": s3.url(bucket, "bench", endpoint=endpoint)}
            self._nodes[place] = FloeNode(work, place, environ)
            stack.callback(self._nodes[place].umount)
        self._nodes["near"].push(source)
        shutil.rmtree(source)

    def measure(self) -> dict[str, Any]:
        """By workload: each round's findings."""
        readings: dict[str, Callable[[Path], float]] = {"large": _cat, "small": workloads.read_small}
        found: dict[str, Any] = {}
        for _ in range(self._options.rounds):
            for place, node in self._nodes.items():
                for name, read in readings.items():
                    node.cold_mount()
                    for when in ("first", "again"):
                        workloads.empty_page_cache()
                        row = _watch(self._work, node.pid("worker"), lambda: read(node.mountpoint))  # noqa: B023
                        found.setdefault(f"{name}, {place}, {when}", []).append(row)
                    node.umount()
        return {"cores": os.cpu_count(), "looks_per_second": RATE, "workloads": found}


def _cat(folder: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cat", str(folder / "large.bin")], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _watch(work: Path, pid: int, read: Callable[[], float]) -> dict[str, Any]:
    """One reading, looked at twice at once: the share of time the lock was held, threads running, who held it."""
    with _looking(work, pid, "--gil") as holding, _looking(work, pid) as running:
        seconds = read()
    holders, looks = _functions(holding.raw), seconds * RATE - holding.failed
    return {
        "seconds": seconds,
        "lock_held": sum(holders.values()) / looks,
        "threads_running": sum(_functions(running.raw).values()) / (seconds * RATE - running.failed),
        "failed_looks": (holding.failed + running.failed) / (2 * seconds * RATE),
        "holders": {name: count / looks for name, count in holders.most_common(TOP)},
    }


@dataclass
class _Seen:
    """What py-spy saw: a file of stacks and how often each was there, and how many of its looks failed."""

    raw: Path
    failed: int = 0


@contextmanager
def _looking(work: Path, pid: int, *more: str):
    """py-spy at process `pid`, never stopping it; what is yielded holds what it saw afterwards."""
    handle, name = tempfile.mkstemp(dir=work)
    os.close(handle)
    words = ["py-spy", "record", "--nonblocking", "--format", "raw", "--function", "--rate", str(RATE)]
    words += ["--pid", str(pid), "--output", name, *more]
    looker = subprocess.Popen(
        words, env={**os.environ, "PATH": _PATH}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert looker.stdout is not None
    try:
        looker.stdout.readline()  # it says that it samples
        seen = _Seen(Path(name))
        yield seen
        looker.send_signal(signal.SIGINT)
        said = looker.communicate(timeout=_WAIT)[0]
        if looker.returncode:
            raise SystemExit(f"bench: py-spy failed: {said}")
        found = re.search(r"Errors: (\d+)", said)
        seen.failed = int(found[1]) if found else 0
    finally:
        looker.kill()
        looker.wait()


def _functions(raw: Path) -> Counter[str]:
    """How often each function was the innermost Python one of a stack."""
    found: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found[stack.rpartition(";")[2]] += int(count)
    return found


def _lines(found: dict[str, Any]):
    yield f"{'':24}{'seconds':>9}{'lock held':>11}{'threads':>9}   ({found['cores']} cores; the middle round's)"
    for name, rows in found["workloads"].items():
        row = sorted(rows, key=lambda row: row["lock_held"])[len(rows) // 2]
        yield f"{name:24}{row['seconds']:9.2f}{row['lock_held']:11.2f}{row['threads_running']:9.2f}"
        yield from (f"    {share:5.2f}  {holder}" for holder, share in row["holders"].items())


if __name__ == "__main__":
    sys.exit(main())
