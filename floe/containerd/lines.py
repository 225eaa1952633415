"""A TOML file as its lines: where a table has its heading and a key its line. Nothing here is sure of what it finds.

A line inside a text of several lines may look like a heading: whoever edits by this compares the outcome.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

Keys = tuple[str, ...]


def toml() -> Any:
    """The standard parser."""
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def line_end(text: str) -> str:
    """How the file ends its lines."""
    return "\r\n" if "\r\n" in text else "\n"


class Lines:
    """The lines of `text`, with their ends; edited in place."""

    def __init__(self, text: str) -> None:
        self._end = line_end(text)
        self._lines = text.splitlines(keepends=True)

    def text(self) -> str:
        """All of them."""
        return "".join(self._lines)

    def has_heading(self, table: Keys) -> bool:
        """Whether the table stands there under a `[heading]`; the root always does."""
        return not table or self._section(table) is not None

    def put(self, path: Keys, value: Any) -> None:
        """Give a key its value: in its line, whose comment stays, or below the heading of its table, which is there."""
        import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast

        number = self._line_of(path)
        if number is not None:
            line = tomlkit.parse(self._lines[number])
            line[path[-1]] = value
            self._lines[number] = tomlkit.dumps(line)
            return
        section = self._section(path[:-1])
        if section is None:
            raise KeyError(path)
        first, last = section
        filled = [line for line in self._lines[first:last] if line.strip() and not line.lstrip().startswith("#")]
        like = filled[0] if filled else self._lines[first - 1] if first else ""
        indent = like[: len(like) - len(like.lstrip())]
        self._lines.insert(first, f"{indent}{tomlkit.dumps({path[-1]: value}).rstrip()}{self._end}")

    def take(self, path: Keys) -> None:
        """Take a key's line away."""
        number = self._line_of(path)
        if number is None:
            raise KeyError(path)
        del self._lines[number]

    def take_heading(self, table: Keys) -> None:
        """Take the heading of a table away, in which there must be no keys; nothing where it has none."""
        section = self._section(table)
        if section is not None and table:
            del self._lines[section[0] - 1]

    def _section(self, table: Keys) -> tuple[int, int] | None:
        """The lines between a table's heading and the next."""
        inside = _inside_texts(self._lines)
        heads = [
            (-1, (), False),
            *((n, *head) for n, line in enumerate(self._lines) if n not in inside and (head := heading_of(line))),
        ]
        for place, (number, path, is_array) in enumerate(heads):
            if path == table and not is_array:
                return number + 1, heads[place + 1][0] if place + 1 < len(heads) else len(self._lines)
        return None

    def _line_of(self, path: Keys) -> int | None:
        section = self._section(path[:-1])
        for number in range(*section) if section else ():
            if list(_parsed(self._lines[number])) == [path[-1]]:
                return number
        return None


def _inside_texts(lines: Sequence[str]) -> set[int]:
    """The lines that belong to a text begun on a line before."""
    inside: set[int] = set()
    quotes = ""
    for number, line in enumerate(lines):
        if quotes:
            inside.add(number)
        rest = line
        while True:
            if quotes:
                _, found, rest = rest.partition(quotes)
                if not found:
                    break
                quotes = ""
            places = [(rest.find(sign), sign) for sign in ('"""', "'''") if sign in rest]
            if not places or "#" in rest[: min(places)[0]]:
                break
            place, quotes = min(places)
            rest = rest[place + 3 :]
    return inside


def heading_of(line: str) -> tuple[Keys, bool] | None:
    """The path in `[a.b]` or `[[a.b]]`, and whether it is the latter."""
    if not line.lstrip().startswith("["):
        return None
    found: Any = _parsed(line)
    path: list[str] = []
    is_array = False
    while found:
        if isinstance(found, list):
            is_array, found = True, found[0]
            continue
        ((key, found),) = found.items()
        path.append(key)
    return (tuple(path), is_array) if path else None


def _parsed(line: str) -> dict[str, Any]:
    """A line by itself; empty when it is no TOML."""
    try:
        return dict(toml().loads(line.strip()))
    except toml().TOMLDecodeError:
        return {}
