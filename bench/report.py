"""Medians and ratios of one run, for people and as JSON."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASE = "native erofs"
MAX_SPREAD = 0.10  # of the base's median: a noisier round says more about the machine than about Floe


@dataclass
class Results:
    """Seconds by (workload, subject), one list item per kept round."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    unsteady: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)  # by workload: what speeds are relative to, where not BASE

    def measure(self, workload: str, rounds: int, run: Callable[[], dict[str, float]], base: str = BASE) -> None:
        """Run rounds until `rounds` of them lie within MAX_SPREAD of the base's median, three times as many at most.

        When not one of them is that steady, all are kept and the table says that the machine was not.
        """
        self.bases[workload] = base
        seen: list[dict[str, float]] = []
        kept: list[dict[str, float]] = []
        while len(kept) < rounds and len(seen) < 3 * rounds:
            seen.append(run())
            middle = statistics.median(r[base] for r in seen)
            kept = [r for r in seen if abs(r[base] - middle) <= MAX_SPREAD * middle]
        if not kept:
            kept, self.unsteady = seen, [*self.unsteady, workload]
        self.discarded[workload] = len(seen) - len(kept)
        self.seconds[workload] = {name: [r[name] for r in kept] for name in kept[0]}

    def add(self, workload: str, rounds: Sequence[Mapping[str, float]], base: str) -> None:
        """Take rounds that were measured already, all of them; speeds are relative to the subject `base`."""
        self.bases[workload], self.discarded[workload] = base, 0
        self.seconds[workload] = {name: [r[name] for r in rounds] for name in rounds[0]}

    def as_json(self) -> dict[str, Any]:
        """Medians, speed relative to the workload's base and to ext4 (above 1: faster), and every measured second."""
        table = {}
        for workload, subjects in self.seconds.items():
            base = self.bases.get(workload, BASE)
            medians = {name: statistics.median(values) for name, values in subjects.items()}
            table[workload] = {
                name: {
                    "median_seconds": median,
                    _speed_to(base): medians[base] / median,
                    **({"speed_to_ext4": medians["ext4"] / median} if "ext4" in medians else {}),
                    "seconds": subjects[name],
                }
                for name, median in medians.items()
            }
        return {
            "facts": self.facts,
            "discarded_rounds": self.discarded,
            "unsteady": self.unsteady,
            "workloads": table,
        }

    def as_text(self) -> str:
        """A table per workload, and the facts."""
        lines = []
        for workload, subjects in self.as_json()["workloads"].items():
            discarded = self.discarded[workload]
            kept = len(next(iter(self.seconds[workload].values())))
            noise = "NO STEADY ROUND" if workload in self.unsteady else f"{discarded} discarded for noise"
            base = self.bases.get(workload, BASE)
            lines.append(f"{workload}  ({kept} rounds kept, {noise})")
            for name, row in subjects.items():
                lines.append(
                    f"  {name:<16} {row['median_seconds']:8.3f} s"
                    f"   {row[_speed_to(base)]:5.2f} x {base}"
                    + (f"   {row['speed_to_ext4']:5.2f} x ext4" if "speed_to_ext4" in row else "")
                )
        lines += [f"{key}: {value}" for key, value in self.facts.items()]
        return "\n".join(lines)


def percentile(values: list[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, -(-round(share * 10_000) * len(ranked) // 10_000) - 1)]


def _speed_to(base: str) -> str:
    """The key of speeds relative to `base`: speed_to_native_erofs."""
    return "speed_to_" + "_".join(re.findall(r"\w+", base))
