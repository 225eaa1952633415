"""How much of a disk that kubelet watches must stay free, so that a full cache is no reason to evict a pod.

kubelet's names and defaults: https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/ and
KubeletConfiguration (v1beta1): evictionHard, evictionSoft, imageGCHighThresholdPercent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bootstrap.node import Kubelet

_SIGNALS = ("nodefs.available", "imagefs.available", "containerfs.available")
_DEFAULT = 15.0  # per cent: of imagefs.available; as much is free when the collection of images begins by default
_MARGIN = 5.0  # per cent of the disk: kubelet looks every ten seconds, and others write meanwhile
_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
}
_QUANTITY = re.compile(r"([0-9.]+)(%|[kMGT]i?|Ki)?")
# A key of a YAML block, or an entry below it; kubelet's own file has no more of YAML than that in what is read here.
_YAML = re.compile(r"""(?P<indent>\s*)["']?(?P<key>[A-Za-z][\w.]*)["']?\s*:\s*(?P<value>.*)""")


@dataclass(frozen=True)
class Threshold:
    """`share` of the disk in per cent, or `size` in bytes; the larger of both counts. `source` says where from."""

    share: float
    size: int
    source: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.share:g}%" + (f" or {self.size >> 20} MiB" if self.size else "")


def room_for_others(threshold: Threshold, total: int) -> str:
    """For the setting cache_min_free, on a disk of `total` bytes; 0: not known."""
    share = threshold.share
    if threshold.size:
        share = max(share, 100.0 * threshold.size / total if total else 2 * _DEFAULT)
    return f"{min(90, math.ceil(share + _MARGIN))}%"


def highest_threshold(kubelet: Kubelet | None) -> Threshold:
    """At what is free kubelet first does something about it: evicts, or removes images."""
    if kubelet is None:
        return Threshold(_DEFAULT, 0, "kubelet's defaults")
    values = [value for text in _thresholds(kubelet) if (value := _quantity(text)) is not None]
    share = max((value for value, kind in values if kind == "%"), default=0.0)
    size = max((int(value) for value, kind in values if kind != "%"), default=0)
    high = _image_gc(kubelet)
    source = "as its configuration says" if values or high is not None else "kubelet's defaults"
    # What a file does not name keeps its default, or is off, depending on kubelet's version: the careful one counts.
    share = max(share, _DEFAULT if not values or not share else share, 100.0 - high if high is not None else _DEFAULT)
    return Threshold(share, size, source)


def _thresholds(kubelet: Kubelet) -> list[str]:
    found = []
    config = read_config(kubelet.config)
    for key in ("evictionHard", "evictionSoft"):
        table = config.get(key)
        if isinstance(table, Mapping):
            found += [str(table[signal]) for signal in _SIGNALS if signal in table]
    for flag in ("--eviction-hard", "--eviction-soft"):
        for part in (_argument(kubelet.arguments, flag) or "").split(","):
            signal, less, value = part.partition("<")
            if less and signal.strip() in _SIGNALS:
                found.append(value.strip())
    return found


def _image_gc(kubelet: Kubelet) -> float | None:
    for text in (
        _argument(kubelet.arguments, "--image-gc-high-threshold"),
        read_config(kubelet.config).get("imageGCHighThresholdPercent"),
    ):
        try:
            if text not in (None, ""):
                return min(100.0, max(0.0, float(str(text))))
        except ValueError:
            continue
    return None


def _argument(arguments: tuple[str, ...], flag: str) -> str | None:
    for position, text in enumerate(arguments):
        if text == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if text.startswith(flag + "="):
            return text[len(flag) + 1 :]
    return None


def read_config(text: str) -> dict[str, Any]:
    """A KubeletConfiguration's keys, and those one below: JSON, or YAML in blocks. What is of another form is left out."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
    config: dict[str, Any] = {}
    table: dict[str, str] | None = None
    for line in text.splitlines():
        match = _YAML.fullmatch(line.partition(" #")[0].rstrip())
        if match is None:
            continue
        value = match["value"].strip().strip("\"'")
        if not match["indent"]:
            table = None if value else {}
            config[match["key"]] = value or table
        elif table is not None:
            table[match["key"]] = value
    return config


def _quantity(text: str) -> tuple[float, str] | None:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    try:
        number = float(match[1])
    except ValueError:
        return None
    if match[2] == "%":
        return number, "%"
    return number * _UNITS[match[2] or ""], "bytes"
