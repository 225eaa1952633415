"""python -m bench.tracing: what it costs that a start can be looked at afterwards.

A node reads small files. In every other pass its worker is `untraced`: all that notes is taken out, which frames were asked for, which
reads belong to a start, what a read waited for, events and spans. The order changes from round to round:

- `start`: nothing of the model is on the node; it is mounted, and its files are read within the seconds that are recorded. The store is a
  folder: nothing waits for a network, and the processor is what binds.
- `again`: the same files through FUSE out of the node cache, by one worker; the kernel holds the packs, and nothing of the files.
- `far start`: as `start`, from an S3 server 20 ms away.

Told are seconds until all was read, processor seconds of the worker, and by how much each round's were more with tracing: the median and
the bounds within which the true one lies, 95 times of 100.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import command, data, servers, workloads
from bench.floe_node import FloeNode

TRACED, UNTRACED = "traced", "untraced"
START, AGAIN, FAR = "start", "again", "far start"
WALL, PROCESSOR = "until read", "processor"
SIGNALS = {TRACED: signal.SIGRTMIN + 4, UNTRACED: signal.SIGRTMIN + 5}
_PATIENCE = 30.0  # seconds

# Python imports it before anything else where it is the first of its name on PYTHONPATH.
_HOOK = """
import sys
if "--worker" in sys.orig_argv:
    import signal
    from floe.fuse.framemaps import Touched
    from floe.store.eventlog import EventLog
    from floe.store.recorder import Recorder
    from floe.store.spans import Spans
    from floe.store.waits import Waits

    places = [(Touched, "note"), (Recorder, "note"), (Waits, "finished"), (Waits, "requested"), (EventLog, "add"), (Spans, "add")]
    whole = [(owner, name, getattr(owner, name)) for owner, name in places]
    bare = [(owner, name, lambda *_args, **_fields: None) for owner, name in places]

    def listen(number, name, functions):
        def change(*_):
            for owner, attribute, function in functions:
                setattr(owner, attribute, function)
            with open({state!r}, "w") as file:
                file.write(name)

        signal.signal(number, change)

    listen({traced}, "traced", whole)
    listen({untraced}, "untraced", bare)
"""


def main() -> int:
    """Make the data, measure, print."""
    options = _options()
    with command.folder(options.dir) as work, servers.s3(work) as s3:
        bucket = s3.bucket()
        with servers.slowed(s3, latency=options.latency / 1000) as endpoint:
            far = {**s3.environment(), "FLOE_STORE": s3.url(bucket, "tracing", endpoint=endpoint)}
            found = _Tracing(work, options, far).measure()
    command.show(options, found, "\n".join(_lines(found)))
    return 0


def _options() -> argparse.Namespace:
    parser = command.parser("tracing", __doc__, rounds=41, free="2 GiB")
    parser.add_argument("--files", type=int, default=5000, help="number of small files (default 5000)")
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds to the far store (default 20)")
    parser.add_argument("--only", choices=(START, AGAIN, FAR), action="append", help="one of these; may be repeated")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    return options


class _Tracing:
    def __init__(self, work: Path, options: argparse.Namespace, far: Mapping[str, str]) -> None:
        self._options, self._state = options, work / "state"
        source, hook = work / "source", work / "hook"
        data.make(source, large=0, files=options.files)
        hook.mkdir()
        told = {"state": str(self._state), TRACED: int(SIGNALS[TRACED]), UNTRACED: int(SIGNALS[UNTRACED])}
        (hook / "sitecustomize.py").write_text(_HOOK.format(**told))
        self._workloads = options.only or (START, AGAIN, FAR)
        self._nodes = {}
        for name in dict.fromkeys(map(_node_of, self._workloads)):
            environ = far if name == "far" else {"FLOE_STORE": f"file://{work}/store"}
            self._nodes[name] = FloeNode(work, name, {**environ, "PYTHONPATH": str(hook)})
            self._nodes[name].push(source)

    def measure(self) -> dict[str, Any]:
        seconds: dict[str, dict[str, list[float]]] = {
            f"{workload}, {what}": {TRACED: [], UNTRACED: []}
            for workload in self._workloads
            for what in (WALL, PROCESSOR)
        }
        try:
            for workload in self._workloads:
                node = self._nodes[_node_of(workload)]
                if workload == AGAIN and not node.mountpoint.is_mount():
                    node.cold_mount()
                    workloads.read_small(node.mountpoint)
                for number in range(self._options.rounds):
                    command.say(f"{workload}, round {number + 1} of {self._options.rounds}")
                    for kind in (TRACED, UNTRACED) if number % 2 else (UNTRACED, TRACED):
                        if workload == AGAIN:
                            _wait_until_held(node)
                        else:
                            workloads.empty_page_cache()
                            node.cold_mount()
                        for what, value in self._read(node, kind).items():
                            seconds[f"{workload}, {what}"][kind].append(value)
        finally:
            for node in self._nodes.values():
                node.umount()
        return {
            "files": self._options.files,
            "seconds": seconds,
            "cost": {w: _cost(found) for w, found in seconds.items()},
        }

    def _read(self, node: FloeNode, kind: str) -> dict[str, float]:
        worker, began = node.pid("worker"), time.monotonic()
        self._state.unlink(missing_ok=True)
        os.kill(worker, SIGNALS[kind])
        while not self._state.exists() or self._state.read_text() != kind:
            _still(began, "the worker did not answer a signal")
        before = _processor(worker)
        wall = workloads.read_small(node.mountpoint)
        return {WALL: wall, PROCESSOR: _processor(worker) - before}


def _node_of(workload: str) -> str:
    return "far" if workload == FAR else "near"


def _wait_until_held(node: FloeNode) -> None:
    began = time.monotonic()
    while not node.holds_all():
        _still(began, "the node cache was not filled")


def _still(began: float, what: str) -> None:
    if time.monotonic() - began > _PATIENCE:
        raise SystemExit(f"bench: {what} within {_PATIENCE:.0f} s")
    time.sleep(0.01)


def _processor(pid: int) -> float:
    """Seconds that the threads of a process ran. Source: proc(5), /proc/pid/task/tid/schedstat; those that ended are left out."""
    found = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += int(path.read_text().split()[0])
    return found / 1e9


def _cost(found: dict[str, list[float]]) -> dict[str, float]:
    """Percent that rounds took more with tracing: the median, and its bounds by ranks (binomial, two standard deviations)."""
    percents = sorted(100 * (a / b - 1) for a, b in zip(found[TRACED], found[UNTRACED], strict=True))
    aside = int(len(percents) / 2 - len(percents) ** 0.5)
    low, high = percents[max(0, aside)], percents[min(len(percents) - 1, len(percents) - 1 - aside)]
    return {"median": round(statistics.median(percents), 2), "low": round(low, 2), "high": round(high, 2)}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['files']} files; seconds are medians"
    for workload, seconds in found["seconds"].items():
        cells = "   ".join(f"{name} {statistics.median(values):.3f}" for name, values in seconds.items())
        cost = found["cost"][workload]
        yield f"{workload:18} {cells}   costs {cost['median']:+.1f} % (between {cost['low']:+.1f} and {cost['high']:+.1f})"


if __name__ == "__main__":
    sys.exit(main())
