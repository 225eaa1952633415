"""`make soak`: containers and models come, are read and go at random, while everything that can die or fail does.

    PYTHONPATH=tests .venv/bin/python -m soak [--seconds 1800] [--kills 100] [--seed N] [--containerd 1.6] [--json]

Readers compare every byte, name and attribute with what the seed says (see content.py). At the end nothing may be left. The
seed decides what is chosen; when it happens is up to the machine. Exit code 0: no wrong byte, no failed read, no leak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from soak import leaks
from soak.faults import KILLED, Forgetting, Killer, Weather
from soak.readings import Readings
from soak.tally import Tally
from soak.work import Containers, Models, Worker
from soak.world import MIB, World
from support import sweep
from support.containerd import versions
from support.mounts import until

_OVERTIME = 2.0  # times the seconds, for a machine that is too busy for all kills


class Soak:
    def __init__(self, world: World, seed: int, seconds: float, kills: int) -> None:
        self._world, self._seconds = world, seconds
        self.tally = Tally()
        rng = random.Random(seed)
        self._readings = Readings(world.base / "readings", self.tally)
        self._descriptors = leaks.descriptors(world)
        self._watch = leaks.Watch(world, self.tally)
        self._models = Models(world, self.tally, self._readings, rng.getrandbits(32))
        self._containers = Containers(world, self.tally, self._readings, rng.getrandbits(32), self._models)
        self._killers = [
            Killer(world, self.tally, rng.getrandbits(32), names, kills, seconds) for names in (KILLED[:2], KILLED[2:])
        ]
        self._weather = Weather(world, self.tally, rng.getrandbits(32))

    def run(self) -> None:
        """All at once, until the time is over and all kills are done, or until a problem."""
        forgetting = Forgetting(self._world, self.tally)
        breaking = [*(killer.run for killer in self._killers), self._weather.run, forgetting.run]
        working = [self._working(work) for work in (self._models, self._containers)]
        threads = [threading.Thread(target=self._guarded, args=(job,), daemon=True) for job in (*breaking, *working)]
        for thread in threads:
            thread.start()
        try:
            self._look_on()
        except Exception:
            self._join(threads, len(breaking))
            raise
        self._join(threads, len(breaking))  # and not at an interrupt

    def _join(self, threads: list[threading.Thread], breaking: int) -> None:
        """The first `breaking` of the threads are those that break things."""
        self.tally.ending.set()
        for number, thread in enumerate(threads):
            if number == breaking:
                self._world.answer()  # what is under way may wait for who was killed
            thread.join(600)
            if thread.is_alive():
                self.tally.problem("a thread of the soak does not end")

    def _look_on(self) -> None:
        slept = 1.0
        while not self.tally.ending.is_set():
            seconds = self.tally.seconds
            if seconds >= self._seconds and all(killer.done for killer in self._killers):
                return
            if seconds >= self._seconds * _OVERTIME:
                self.tally.problem("the machine is too slow: not all kills were done in twice the time")
            self._readings.look(max(0.0, slept - 1.5))
            self._watch.look()
            self._show_progress()
            before = time.monotonic()
            self.tally.pause(1.0)
            slept = time.monotonic() - before

    def _show_progress(self) -> None:
        if sys.stderr.isatty():
            kills = ", ".join(f"{self.tally.counts['kills'][name]} {name}" for name in KILLED)
            faults = self.tally.counts["faults"].total()
            sys.stderr.write(
                f"\r\x1b[Ksoak: {self.tally.seconds:.0f} of {self._seconds:.0f} s, killed {kills}, {faults} faults"
            )

    def _working(self, work: Worker) -> Callable[[], None]:
        def run() -> None:
            while not self.tally.ending.is_set():
                work.act()
                self.tally.pause(work.random.random())

        return run

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            self.tally.problem(traceback.format_exc())

    def finish(self) -> None:
        """Everything answers again; readers, containers, models and images go; then nothing may be left."""
        world = self._world
        world.answer()
        self._models.finish()
        self._containers.finish()
        self._readings.end_all()
        # What a killed containerd was about to do holds its snapshots by a lease, for a day.
        for lease in world.containerd.ctr("leases", "ls", "-q").stdout.split():
            world.containerd.ctr("leases", "rm", lease)
        for name in world.containerd.ctr("images", "ls", "-q").stdout.split():
            world.containerd.ctr("images", "rm", "--sync", name)  # and collect garbage
        until(world.serving, 60)
        # Killed pushes leave unfinished uploads to the next push of the same, or to the collector.
        done = world.command("gc", "--delete", "--grace", "0m")
        assert done.returncode == 0, done.stderr
        # A tree that an overlay still used when it was unmounted is forgotten, and its packs unpinned, by the next mount.
        self._models.mount()
        self._models.finish()
        for left in leaks.wait_idle(world, self._descriptors):
            self.tally.problem(f"leak: {left}")
        for problem in self._watch.over():
            self.tally.problem(problem)


def soak(base: Path, options: argparse.Namespace) -> dict[str, object]:
    """One run; its report. `problems` is empty when all went well."""
    rng = random.Random(options.seed)
    known = versions()
    version = next((found for found in known if found.name == options.containerd), None) or rng.choice(known)
    stored = rng.random() < 0.6
    settings = {
        "FLOE_COMPLETION": rng.choice(("off", "off", "idle", "always")),
        "FLOE_LOOP": rng.choice(("auto", "auto", "always")),
        "FLOE_PROFILES": rng.choice(("on", "on", "off")),
    }
    before = set(leaks.processes())
    problems: list[str] = []
    report: dict[str, object] = {
        "seed": options.seed, "containerd": version.name, "descriptor_store": stored, "settings": settings,
    }  # fmt: skip
    run = None
    try:
        world = World(base, version, options.seed, stored=stored, settings=settings)
        try:
            run = Soak(world, options.seed, options.seconds, options.kills)
            run.run()
            run.finish()
        except Exception:
            with contextlib.suppress(Exception):
                if run:
                    run.tally.ending.set()
                world.answer()
            raise
        finally:
            world.close()
    except Exception:
        problems.append(traceback.format_exc())
    with contextlib.suppress(AssertionError):
        until(lambda: not leaks.left_over(base, before), 15)
    problems += [f"leak: {left}" for left in leaks.left_over(base, before)]
    if run:
        tally = run.tally
        problems = [*tally.problems, *problems]
        report |= {
            "seconds": round(tally.seconds),
            **{kind: dict(sorted(c.items())) for kind, c in tally.counts.items()},
        }
        report |= {"line": dict(sorted(world.line.faults.items())), "peaks": dict(sorted(tally.peaks.items()))}
        if problems:
            report["last"] = tally.recent()
    for kind, word in (("wrong_bytes", "wrong:"), ("failed_reads", "failed:"), ("leaks", "leak:")):
        report[kind] = sum(problem.startswith(word) for problem in problems)
    return {**report, "problems": problems}


def say(report: dict[str, object]) -> None:
    """The report for people."""
    for name, value in report.items():
        if name in ("problems", "last"):
            continue
        if isinstance(value, dict):
            print(f"{name}:")
            for key, number in value.items():
                big = isinstance(number, int) and "bytes" in key
                print(f"  {key:36} {f'{number / MIB:,.0f} MiB' if big else number}")
        else:
            print(f"{name + ':':38} {value}")
    for line in report.get("last", ()):  # type: ignore[attr-defined]
        print(f"last: {line}")
    for problem in report["problems"]:  # type: ignore[attr-defined]
        print(f"problem: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--kills", type=int, help="how often each daemon is killed at least; one in 18 seconds")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--containerd", choices=[version.name for version in versions()], help="by the seed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.kills = round(options.seconds / 18) if options.kills is None else options.kills
    for left in sweep.begin():
        print(f"soak: left by an earlier session and taken away: {left}", file=sys.stderr)
    base = sweep.folder("soak", Path("/var/tmp"))

    def give_up(number: int, _: object) -> None:
        sweep.clear()
        os._exit(128 + number)  # no way back through what has just lost its daemons

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, give_up)
    report = soak(base, options)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    print(json.dumps(report)) if options.json else say(report)
    if report["problems"]:
        kept = base.rename(base.with_name(base.name.replace("floe-test-soak", "floe-soak")))  # no sweep takes it
        print(f"soak: problems with seed {options.seed}; logs are in {kept}", file=sys.stderr)
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
