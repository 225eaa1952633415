"""What commands print: tables for people, one JSON document for machines, progress on a terminal's stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """What the write path reports to, from any thread; both take bytes."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done."""
        ...

    def total(self, nbytes: int) -> None:
        """So many bytes will be done in all."""
        ...


def print_json(value: object) -> None:
    """One JSON document on stdout; what its encoding cannot hold, bytes of a file's name among it, is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(text + "\n")


def line(text: str = "") -> None:
    """One line on stdout."""
    sys.stdout.write(printable(text) + "\n")


def note(text: str) -> None:
    """A remark on stderr, out of the way of what a script reads."""
    sys.stderr.write(f"floe: {printable(text)}\n")


def printable(text: str) -> str:
    """`text` with control characters escaped: names come from images and stores, not from friends."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on stdout, two spaces apart; headers also when there is no row."""
    cells = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    for row in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def pairs(values: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Names and values, one pair a line, the values aligned."""
    listed = list(values)
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        sys.stdout.write(f"{indent}{name.ljust(width)}  {printable(value)}".rstrip() + "\n")


class _Bar:
    """A rich progress bar; the total may become known after the start."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, nbytes: int) -> None:
        self._bar.advance(self._task, nbytes)

    def total(self, nbytes: int) -> None:
        self._bar.update(self._task, total=nbytes)


def repaired(packs: Mapping[str, int]) -> None:
    """Packs that were damaged in the store, and how many frames of each were made anew."""
    for pack_id, frames in sorted(packs.items()):
        line(f"healed pack {pack_id}, of which {frames} frames were damaged in the store")


@contextmanager
def progress(description: str, *, wanted: bool = True) -> Iterator[Progress | None]:
    """A bar with bytes, rate and time left while the block runs; None when stderr is no terminal."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - some 60 ms, only for terminals
    from rich.progress import (  # noqa: PLC0415 - likewise
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task(printable(description), total=None))
