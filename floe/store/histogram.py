"""How long things took, counted in buckets: what a Prometheus histogram is made of, and what goes over a socket for it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds in seconds: from a read of memory to the deadline of one."""


class Distribution(NamedTuple):
    """What a histogram holds: `counts` for each of `bounds` and one for what is above them; `total` is the sum of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @classmethod
    def decode(cls, data: Mapping[str, Any]) -> Distribution:
        """What `Histogram.encode` gave."""
        return cls(tuple(data["bounds"]), tuple(data["counts"]), float(data["total"]))

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds as text, and how many values are not above them; the last is "+Inf"."""
        found, sofar = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            sofar += count
            found.append((bound, float(sofar)))
        return found


class Histogram:
    """Counts values by `bounds`. One thread adds; others may look, and miss the latest."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...] = LATENCIES) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def encode(self) -> dict[str, Any]:
        """As JSON holds it; see Distribution.decode."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "total": self._total}
