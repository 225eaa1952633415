"""Which steps of Floe's code an input takes: from one line to the next."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class Target(Protocol):
    """See targets.py."""

    limit: int

    def run(self, data: bytes) -> None: ...
    def seeds(self) -> Any: ...


def lines_of(target: Target, data: bytes) -> set[tuple[str, int]]:
    """(file, line before and line, in one number) of every step in the package."""
    found = set[tuple[str, int]]()
    last = 0

    def local(frame: Any, event: str, _: object) -> Any:
        nonlocal last
        if event == "line":
            found.add((frame.f_code.co_filename, last << 16 | frame.f_lineno))
            last = frame.f_lineno
        return local

    def begin(frame: Any, _event: str, _: object) -> Any:
        return local if "floe/" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename else None

    sys.settrace(begin)
    try:
        target.run(data)
    finally:
        sys.settrace(None)
    return found
