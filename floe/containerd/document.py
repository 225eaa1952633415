"""A TOML file that other people wrote: keys set and taken out, everything else as it was, byte for byte.

Edited are single lines, by tomlkit, which keeps their formatting. What came out is compared with what was meant: by an
independent parser, and line by line. Where the result is not exactly that, the edit is refused.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floe.containerd.lines import Lines, heading_of, line_end, toml
from floe.containerd.wanted import Append, Change, Keys, Set, lookup
from floe.store.errors import BadInputError, PreconditionError

_log = logging.getLogger(__name__)

BANNER = "# Floe: floe containerd unconfigure takes this out again"


def parse(text: str, path: Path) -> dict[str, Any]:
    """The file's content. BadInputError."""
    try:
        return dict(toml().loads(text))
    except toml().TOMLDecodeError as error:
        raise BadInputError(f"{path} is not valid TOML: {error}", hint="mend the file, then try again") from error


def apply(text: str, changes: Sequence[Change], path: Path) -> tuple[str, list[str]]:
    """`text` with the changes made, and the tables of Floe's own that stand below it, as they are written there.

    PreconditionError when that cannot be done without touching other lines.
    """
    before = parse(text, path)
    after = expected(before, changes)
    if after == before:
        return text, []
    whole = text if not text or text.endswith("\n") else text + line_end(text)
    for edit in (_in_place_and_below, _in_place):
        try:
            edited, blocks = edit(whole, changes)
            if parse(edited, path) == after and not lost_lines(text, edited, changes):
                return edited, blocks
        except Exception as error:  # whatever the library trips over: the other way, or the refusal below
            _log.debug("putting keys into %s: %r", path, error)
    raise PreconditionError(
        f"Floe's keys cannot be put into {path} without touching other lines of it",
        hint="write inline tables ({...}) of plugins and proxy_plugins as [tables], then try again",
    )


def expected(before: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """What the file shall say. Pure."""
    after = copy.deepcopy(before)
    for change in changes:
        table = after
        for key in change.path[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise PreconditionError(f"{dotted(change.path)}: {key} is no table")
        if isinstance(change, Set):
            table[change.path[-1]] = copy.deepcopy(change.value)
        else:
            table.setdefault(change.path[-1], []).append(dict(change.value))
    return after


def lost_lines(before: str, after: str, changes: Sequence[Change]) -> list[str]:
    """Lines of `before` that are no longer there, but for those whose key was changed."""
    own = {change.path[-1] for change in changes}
    removed = Counter(before.splitlines()) - Counter(after.splitlines())
    return [line.strip() for line in removed if line.strip() and not any(key in line for key in own)]


def tables_made(before: dict[str, Any], changes: Sequence[Change]) -> list[Keys]:
    """The tables, and arrays of tables, that the changes add to `before`."""
    paths = {
        change.path[:length] for change in changes for length in range(1, len(change.path) + isinstance(change, Append))
    }
    return sorted(path for path in paths if lookup(before, path) is None)


def dotted(path: Keys) -> str:
    """A path as TOML writes it."""
    return ".".join(
        key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _quoted(key) for key in path
    )


def _quoted(text: str) -> str:
    import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast

    return str(tomlkit.item(text).as_string())


def _in_place_and_below(text: str, changes: Sequence[Change]) -> tuple[str, list[str]]:
    """Keys go into the tables that have a heading; tables that are not there yet, below all that is."""
    lines = Lines(text)
    new: dict[Keys, list[tuple[str, Any]]] = {}
    entries: list[Append] = []
    for change in changes:
        if isinstance(change, Append):
            entries.append(change)
        elif lines.has_heading(change.path[:-1]):
            lines.put(change.path, change.value)
        else:
            new.setdefault(change.path[:-1], []).append((change.path[-1], change.value))
    blocks = [_block(f"[{dotted(table)}]", keys) for table, keys in new.items()]
    blocks += [_block(f"[[{dotted(one.path)}]]", list(one.value.items())) for one in entries]
    edited = lines.text()
    if not blocks:
        return edited, []
    end = line_end(text)
    blocks = [block.replace("\n", end) for block in blocks]
    return f"{edited}{end if text else ''}{BANNER}{end}{end.join(blocks)}", blocks


def _block(heading: str, keys: Sequence[tuple[str, Any]]) -> str:
    return "".join([f"{heading}\n", *(f"{dotted((key,))} = {_item(value)}\n" for key, value in keys)])


def _in_place(text: str, changes: Sequence[Change]) -> tuple[str, list[str]]:
    """All by the library, wherever it puts it: inline and dotted tables."""
    import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast

    document = tomlkit.parse(text)
    for change in changes:
        if isinstance(change, Append):
            _extend(document, change)
        else:
            _put(document, change)
    return tomlkit.dumps(document), []


def _put(document: Any, change: Set) -> None:
    _table_of(document, change)[change.path[-1]] = change.value


def _extend(document: Any, change: Append) -> None:
    import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast
    from tomlkit.items import AoT  # noqa: PLC0415 - likewise

    table, last = _table_of(document, change), change.path[-1]
    if last not in table:
        table[last] = tomlkit.aot()
    entry: Any = tomlkit.table() if isinstance(table[last], AoT) else tomlkit.inline_table()
    entry.update(change.value)
    table[last].append(entry)


def _table_of(document: Any, change: Change) -> Any:
    """The table that a change is made in, which is made when it is not there."""
    import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast

    table = document
    for key in change.path[:-1]:
        if key not in table:
            table[key] = tomlkit.table(is_super_table=True)
        table = table[key]
    return table


def _item(value: Any) -> str:
    import tomlkit  # noqa: PLC0415 - lazy: keeps --help fast

    return str(tomlkit.item(value).as_string())


def take_out(
    text: str, changes: Sequence[tuple[Change, Any]], made: Sequence[Keys], blocks: Sequence[str], path: Path
) -> tuple[str, list[str]]:
    """`text` without Floe's keys: each change with what stood there before it, None for nothing.

    `made`: tables that go too when nothing is left in them; `blocks`: tables as `apply` wrote them. Also the keys that
    were left, because somebody gave them another value since. PreconditionError as for `apply`.
    """
    meant, undone, left = _without(parse(text, path), changes)
    _prune(meant, made)
    try:
        edited = _edit_out(text, undone, made, blocks)
        own = {BANNER, *(line.strip() for block in blocks for line in block.splitlines())}
        lost = [line for line in lost_lines(text, edited, [change for change, _ in undone]) if line not in own]
        stray = [line for line in lost if (heading_of(line) or ((), False))[0] not in made]
        if parse(edited, path) == meant and not stray:
            return edited, left
    except Exception as error:  # whatever the library trips over
        _log.debug("taking keys out of %s: %r", path, error)
    raise PreconditionError(
        f"Floe's keys cannot be taken out of {path} without touching other lines of it",
        hint=f"take them out by hand: {', '.join(sorted({dotted(change.path) for change, _ in undone}))}",
    )


def _without(
    config: dict[str, Any], changes: Sequence[tuple[Change, Any]]
) -> tuple[dict[str, Any], list[tuple[Change, Any]], list[str]]:
    """What a file shall say without Floe, the changes undone for that, and the keys that are somebody else's now. Pure."""
    meant = copy.deepcopy(config)
    undone: list[tuple[Change, Any]] = []
    left: list[str] = []
    for change, old in reversed(changes):
        holder = lookup(meant, change.path[:-1])
        found = None if holder is None else holder.get(change.path[-1])
        if found is None or (isinstance(change, Append) and change.value not in found):
            continue
        if isinstance(change, Append):
            found.remove(change.value)
        elif found != change.value:
            left.append(dotted(change.path))
            continue
        elif old is None:
            del holder[change.path[-1]]
        else:
            holder[change.path[-1]] = copy.deepcopy(old)
        undone.append((change, old))
    return meant, undone, left


def _edit_out(text: str, undone: Sequence[tuple[Change, Any]], made: Sequence[Keys], blocks: Sequence[str]) -> str:
    """Whole tables, where they stand as they were written; the rest line by line, and headings of `made` with nothing left."""
    end = line_end(text)
    # First: what stands right behind the last block must not come to stand behind this.
    text = "".join(line for line in text.splitlines(keepends=True) if line.strip() != BANNER)
    for block in reversed(blocks):
        before, found, after = text.partition(block)
        ends = all(not line.strip() or line.lstrip().startswith(("[", "#")) for line in after.splitlines()[:1])
        if found and ends and block not in after:
            text = (before.removesuffix(end) if before == end or before.endswith(2 * end) else before) + after
    config, lines = parse(text, Path()), Lines(text)
    for change, old in undone:
        if isinstance(change, Set) and lookup(config, change.path) == change.value:
            if old is None:
                lines.take(change.path)
            else:
                lines.put(change.path, old)
    for table in sorted(made, key=len, reverse=True):
        if lookup(parse(lines.text(), Path()), table) == {}:
            lines.take_heading(table)
    return lines.text()


def _prune(meant: dict[str, Any], made: Sequence[Keys]) -> None:
    """Remove what Floe made and is empty now, the innermost first. Pure."""
    for path in sorted(made, key=len, reverse=True):
        found = lookup(meant, path)
        if found is not None and not found:
            holder = lookup(meant, path[:-1])
            del holder[path[-1]]
