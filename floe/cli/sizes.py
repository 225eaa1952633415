"""Sizes as people write them (`500MiB`, `80%`) and as people read them (`1.2 GiB`), and spans of time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from floe.store.errors import BadInputError

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_SPANS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True)
class Size:
    """A number of bytes, or a share of a disk: exactly one of `bytes` and `percent` is set."""

    bytes: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, value: object, *, percent: bool = True) -> Size:
        """From an int (bytes) or text; `percent` says whether `80%` is allowed. BadInputError tells the grammar."""
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(bytes=value)
        text = value.strip() if isinstance(value, str) else ""
        if percent and (match := _PERCENT.fullmatch(text)) and float(match[1]) <= 100:
            return cls(percent=float(match[1]))
        match = _SIZE.fullmatch(text)
        factor = _BY_LOWER.get(match[2].lower()) if match else None
        if match is None or factor is None:
            allowed = "bytes, KiB, MiB, GiB, TiB" + (" or a percentage of the disk" if percent else "")
            raise BadInputError(f"{value!r} is not a size", hint=f"use {allowed}, for example 500MiB")
        return cls(bytes=int(float(match[1]) * factor))

    def of(self, total: int) -> int:
        """The bytes meant, on a disk of `total` bytes."""
        return self.bytes if self.bytes is not None else int(total * (self.percent or 0.0) / 100)

    def __str__(self) -> str:
        return str(self.bytes) if self.bytes is not None else f"{self.percent:g}%"


def format_size(count: float) -> str:
    """Bytes for people, three significant digits: `0 B`, `1.50 KiB`, `24.0 MiB`, `3.91 GiB`."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{int(value)} B"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def parse_seconds(text: str) -> float:
    """A span as people write it, `90m`, `24h` or `7d`; a number alone is seconds. BadInputError tells the grammar."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise BadInputError(f"{text!r} is not a span of time", hint="use s, m, h or d, for example 36h")
    return float(match[1]) * _SPANS[match[2]]


def format_seconds(seconds: float) -> str:
    """A span for people: `0.4 s`, `12 s`, `3 min 20 s`, `5 h 2 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
