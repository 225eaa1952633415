"""Processes that read trees and compare (soak.reader), watched: what they find, and that they go on."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from soak.tally import Tally

TESTS = Path(__file__).resolve().parents[1]
_SILENCE = 120.0  # seconds without a read that came back: longer than any fault lasts
_END = 200.0


class Reading:
    """One process. `end` it before its tree goes."""

    def __init__(self, label: str, argv: list[str], out: Path) -> None:
        self.label, self.out = label, out
        self.figures = {"reads": 0, "bytes": 0, "walks": 0}
        self.found: list[str] = []
        self.heard = time.monotonic()
        self._offset = 0
        environ = {**os.environ, "PYTHONPATH": str(TESTS)}
        self.process = subprocess.Popen(
            [sys.executable, *argv], cwd=TESTS.parent, env=environ, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lock = threading.Lock()

    def look(self) -> list[str]:
        """What it found since the last look."""
        with self.lock:
            found = []
            with self.out.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]
            if lines:
                self._offset += len(lines) + 1
                self.heard = time.monotonic()
            for line in lines.splitlines():
                message = json.loads(line)
                if "kind" in message:
                    found.append(f"{message['kind']}: {self.label}: {message['path']}: {message['what']}")
                else:
                    self.figures = message
            return found

    def end(self, seconds: float = _END) -> list[str]:
        """Have it end; what it found."""
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        found = []
        try:
            self.process.stdin.close()
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            found.append(f"failed: {self.label}: a read did not come back within {seconds:g} s: {self._where()}")
            self.process.kill()
            self.process.wait(seconds)
        if self.process.returncode and not found:
            said = self.process.stderr.read().decode(errors="replace")[-2000:]
            found.append(f"failed: {self.label}: the reader ended with {self.process.returncode}: {said}")
        self.process.stderr.close()
        return [*self.look(), *found]

    def _where(self) -> str:
        try:
            return Path(f"/proc/{self.process.pid}/stack").read_text()
        except OSError as error:
            return str(error)


class Readings:
    """Starts them and adds up what they did. Thread-safe."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self._folder, self._tally = folder, tally
        folder.mkdir()
        self._numbers = itertools.count()
        self._running: dict[int, Reading] = {}
        self._lock = threading.Lock()

    def start(self, label: str, tree: Path, root: str, rng: random.Random) -> int:
        """Read `tree` at `root`; a number for `end`."""
        with self._lock:
            number = next(self._numbers)
            out = self._folder / f"{number}.jsonl"
            out.touch()
            words = ["-m", "soak.reader", str(tree), root, str(rng.getrandbits(32)), str(out)]
            self._running[number] = Reading(label, words, out)
        self._tally.count("actions", "reader started", note=label)
        return number

    def end(self, number: int) -> None:
        """Its reads have come back, and are counted, when this returns."""
        with self._lock:
            reading = self._running.pop(number)
        for problem in reading.end():
            self._tally.problem(problem)
        for name, value in reading.figures.items():
            self._tally.count("reads", {"walks": "trees compared", "bytes": "bytes compared"}.get(name, name), value)
        reading.out.unlink()

    def end_all(self) -> None:
        for number in list(self._running):
            self.end(number)

    def look(self, slack: float) -> None:
        """Tell the problems of all, and who is silent for too long; `slack` in seconds: for which this process slept too."""
        with self._lock:
            running = list(self._running.values())
        for reading in running:
            reading.heard += slack
            for problem in reading.look():
                self._tally.problem(problem)
            if reading.process.poll() is None and time.monotonic() - reading.heard > _SILENCE:
                self._tally.problem(f"failed: {reading.label}: no read came back for {_SILENCE:g} s")
