"""What a run did and met: counts by kind, problems, and the last things that were done before one."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

_REMEMBERED = 60
_MOST_PROBLEMS = 30


class Tally:
    """Thread-safe. `ending` is set when the run is over, or has a problem."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.problems: list[str] = []
        self.counts: dict[str, Counter[str]] = {
            kind: Counter() for kind in ("actions", "kills", "faults", "tried again", "reads")
        }
        self.peaks: Counter[str] = Counter()
        self._started = time.monotonic()
        self._recent: deque[str] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def count(self, kind: str, name: str, number: int = 1, note: str = "") -> None:
        """Add to a count; `kind` is one of those of `counts`. `note`: more for the list of what was done last."""
        with self._lock:
            self.counts[kind][name] += number
            if kind != "reads":
                self._recent.append(f"{self.seconds:8.2f} {kind}: {name}{note and ', ' + note}")

    def peak(self, name: str, value: int) -> None:
        with self._lock:
            self.peaks[name] = max(self.peaks[name], value)

    def problem(self, text: str) -> None:
        """Something that must not be: the run ends."""
        with self._lock:
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(text)
            self._recent.append(f"{self.seconds:8.2f} PROBLEM: {text}")
        self.ending.set()

    def recent(self) -> list[str]:
        with self._lock:
            return list(self._recent)

    def pause(self, seconds: float) -> bool:
        """Wait so long; False when the run ends meanwhile."""
        return not self.ending.wait(seconds)
