"""Whether the reads of a cache directory should go around its disk, since a hit there costs clearly more than a miss. Pure.

A hit is a read that had to wait for the disk (the page cache does not count), a miss one that had to wait for the store, both by
the size of the read. Medians of the last samples of each size are compared, once there are enough that are recent. What is not
in use is measured by probes: now and then a few reads are sent the other way. So a warm cache learns what a miss costs, and a
disk that is gone around is found to have recovered. After a change it stays for a while, longer each time, and is judged by
samples taken since.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final

from floe.store.policy import ALWAYS, AUTO, NEVER

_log = logging.getLogger(__name__)

_LEAST = 8  # samples of a size that say anything
_KEPT = 32  # samples of a size
_WINDOW = 300.0  # seconds that a sample counts
_FLOOR = 0.005  # seconds: a disk this fast is never gone around, no store is much faster
_ENTER, _LEAVE = 2.0, 1.0  # costs of a hit in those of a miss: go around at the one, come back at the other
_STAY, _STAY_MAX = 30.0, 3600.0  # seconds in a state before it may change: doubled with each change
_PROBE_EVERY, _PROBE_FOR = 30.0, 2.0  # seconds
_LOOK = 0.01  # seconds between two looks at the samples
_PATIENCE, _PATIENCE_HITS = 0.5, 4  # a read around the disk waits for the store: seconds, or some costs of a hit
_SMALLEST: Final = 12  # the class of 4 KiB: smaller reads cost the same


class Costs:
    """Seconds that reads took, by size: powers of two, a read counts as the next larger. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: dict[int, deque[tuple[float, float]]] = {}
        self._lock = threading.Lock()
        self.count = 0  # of all samples so far

    def add(self, nbytes: int, seconds: float) -> None:
        """A read of `nbytes` took so long."""
        size = max((nbytes - 1).bit_length(), _SMALLEST)
        with self._lock:
            self._samples.setdefault(size, deque(maxlen=_KEPT)).append((self._clock(), seconds))
            self.count += 1

    def medians(self) -> Mapping[int, float]:
        """Seconds by size class (bytes are 2 to its power), where enough is known of the last minutes."""
        since = self._clock() - _WINDOW
        with self._lock:
            recent = {size: [took for at, took in kept if at >= since] for size, kept in self._samples.items()}
        return {size: median(took) for size, took in sorted(recent.items()) if len(took) >= _LEAST}

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._samples.clear()


class Bypass:
    """The judgement of one directory, called `name` in the log. `misses`: what misses cost, of all directories together.

    `diverts`, which any thread may look at, is whether a read that the page cache does not answer should ask the store now.
    """

    def __init__(
        self,
        mode: str = NEVER,
        name: str = "",
        misses: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self.name = name
        self.slow = False  # a hit costs more than a miss
        self.changes = 0
        self.diverts = mode == ALWAYS
        self._clock = clock
        self._hits = Costs(clock)
        self.misses = misses or Costs(clock)
        self._lock = threading.Lock()
        self._look_at = 0.0
        self._stay = _STAY
        self._stay_until = clock()
        self._probe_at = clock()
        self._probing_until = 0.0  # 0: not probing
        self._probe_count = 0  # samples when the probe began

    def hit(self, nbytes: int, seconds: float) -> None:
        """A read waited for the disk."""
        self._hits.add(nbytes, seconds)
        self.look()

    def patience(self) -> float:
        """Seconds after which a read that went around the disk should turn to it after all."""
        return max(_PATIENCE, _PATIENCE_HITS * max(self._hits.medians().values(), default=0.0))

    def look(self) -> None:
        """See what is known by now; called with each sample."""
        now = self._clock()
        if now < self._look_at:
            return
        with self._lock:
            self._look_at = now + _LOOK
            hits, misses = self._hits.medians(), self.misses.medians()
            sizes = hits.keys() & misses.keys()
            if sizes and now >= self._stay_until:
                hit, miss = (sum(costs[size] for size in sizes) for costs in (hits, misses))
                if self.slow != (hit > (_LEAVE if self.slow else _ENTER) * miss and hit >= _FLOOR * len(sizes)):
                    self._change(now, max(sizes), hits, misses)
            if self.mode == AUTO:
                self._probe(now, known=bool(sizes), worst=max(hits.values(), default=0.0))

    def _probe(self, now: float, *, known: bool, worst: float) -> None:
        """Begin or end to send reads the other way; `worst`: seconds of the slowest hits."""
        other = self._hits if self.slow else self.misses
        if self._probing_until:
            if now >= self._probing_until or other.count - self._probe_count >= 2 * _LEAST:
                self._probing_until, self._probe_at = 0.0, now + _PROBE_EVERY
        elif now >= self._probe_at and (self.slow or (not known and worst >= _FLOOR)):
            self._probing_until, self._probe_count = now + _PROBE_FOR, other.count
        self.diverts = self.slow != bool(self._probing_until)

    def _change(self, now: float, size: int, hits: Mapping[int, float], misses: Mapping[int, float]) -> None:
        self.slow = not self.slow
        self._stay_until = now + self._stay
        self._stay = min(2 * self._stay, _STAY_MAX)
        self._probing_until, self._probe_at = 0.0, now + _PROBE_EVERY
        self._hits.forget()  # what a crowd of readers measured says nothing about a disk that is left alone, and the reverse
        self.changes += 1
        costs = f"a read of {1 << size >> 10} KiB takes {hits[size] * 1e3:.1f} ms there, {misses[size] * 1e3:.1f} ms from the store"
        if not self.slow:
            _log.warning("the cache disk of %s is worth reading again: %s", self.name, costs)
        elif self.mode == AUTO:
            _log.warning(
                "A HIT COSTS MORE THAN A MISS on the cache disk of %s: %s. Reads go around it until that changes; "
                "put the cache on a local SSD (cache_dir, cache_bypass)",
                *(self.name, costs),
            )
        else:
            _log.warning(
                "A HIT COSTS MORE THAN A MISS on the cache disk of %s: %s. cache_bypass is %r; put the cache on a local SSD",
                *(self.name, costs, self.mode),
            )

    def status(self) -> dict[str, Any]:
        """`mode`, `slow`, `bypassed`, `changes`; by bytes of a read the seconds of a hit and of a miss, where known."""
        hits, misses = self._hits.medians(), self.misses.medians()
        return {
            "mode": self.mode,
            "slow": self.slow,
            "bypassed": self.mode == ALWAYS or (self.mode == AUTO and self.slow),
            "changes": self.changes,
            "hit_seconds": {str(1 << size): seconds for size, seconds in hits.items()},
            "miss_seconds": {str(1 << size): seconds for size, seconds in misses.items()},
        }
