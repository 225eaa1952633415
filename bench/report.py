"""Medians and ratios of one run, for people and as JSON."""

import statistics
from dataclasses import dataclass, field
from typing import Any

BASE = "native erofs"
MAX_SPREAD = 0.10  # of the base's median: a noisier round says more about the machine than about Floe


@dataclass
class Results:
    """Seconds by (workload, subject), one list item per kept round."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add_rounds(self, workload: str, rounds: list[dict[str, float]]) -> None:
        """Keep the rounds in which the base lies within MAX_SPREAD of its median over all rounds."""
        middle = statistics.median(r[BASE] for r in rounds)
        kept = [r for r in rounds if abs(r[BASE] - middle) <= MAX_SPREAD * middle]
        self.discarded[workload] = len(rounds) - len(kept)
        self.seconds[workload] = {name: [r[name] for r in kept] for name in kept[0]}

    def as_json(self) -> dict[str, Any]:
        """Medians, speed relative to native EROFS and to ext4 (above 1: faster), and every measured second."""
        table = {}
        for workload, subjects in self.seconds.items():
            medians = {name: statistics.median(values) for name, values in subjects.items()}
            table[workload] = {
                name: {
                    "median_seconds": median,
                    "speed_to_native_erofs": medians[BASE] / median,
                    "speed_to_ext4": medians["ext4"] / median,
                    "seconds": subjects[name],
                }
                for name, median in medians.items()
            }
        return {"facts": self.facts, "discarded_rounds": self.discarded, "workloads": table}

    def as_text(self) -> str:
        """A table per workload, and the facts."""
        lines = []
        for workload, subjects in self.as_json()["workloads"].items():
            discarded = self.discarded[workload]
            kept = len(next(iter(self.seconds[workload].values())))
            lines.append(f"{workload}  ({kept} rounds kept, {discarded} discarded for noise)")
            for name, row in subjects.items():
                lines.append(
                    f"  {name:<16} {row['median_seconds']:8.3f} s"
                    f"   {row['speed_to_native_erofs']:5.2f} x native EROFS   {row['speed_to_ext4']:5.2f} x ext4"
                )
        lines += [f"{key}: {value}" for key, value in self.facts.items()]
        return "\n".join(lines)
