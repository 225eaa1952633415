"""The medians of a run as bars, a panel for each workload."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

BAR = 0.35  # inches


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw what `Results.as_json` gave into `path`; its ending says the format."""
    tables = results["workloads"]
    heights = [len(rows) for rows in tables.values()]
    figure, panels = plt.subplots(
        len(tables), 1, figsize=(8, BAR * sum(heights) + 0.9 * len(heights)), height_ratios=heights, squeeze=False
    )
    for (title, rows), panel in zip(tables.items(), panels[:, 0], strict=True):
        names = list(rows)[::-1]
        seconds = [rows[name]["median_seconds"] for name in names]
        colours = ["tab:blue" if name.startswith("floe") else "tab:gray" for name in names]
        panel.bar_label(panel.barh(names, seconds, color=colours), fmt="%.2f s", padding=3)
        panel.set_title(title, loc="left", fontsize=10)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds, median; shorter is better")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
