"""What containerd itself makes of a configuration (`containerd config dump`): the last word about an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from floe.containerd.document import dotted, parse
from floe.containerd.version import ask
from floe.containerd.wanted import CRI, IMAGES, RUNTIME, UNPACK, Append, Change, Keys, Set, holds, leaves

# A file of version 2 is shown by 2.x as one of version 3.
_MOVED: dict[Keys, Keys] = {
    (*CRI, "containerd", "runtimes"): (*RUNTIME, "containerd", "runtimes"),
    (*CRI, "containerd"): IMAGES,
}


def dump(binary: Path, main: Path) -> dict[str, Any]:
    """The configuration in force. UnavailableError when containerd does not accept the file."""
    return parse(ask(binary, "--config", str(main), "config", "dump"), main)


def as_dumped(change: Change, config: Mapping[str, Any]) -> Change:
    """The change where this dump shows it."""
    if config.get("version") == 3:
        for old, new in _MOVED.items():
            if change.path[: len(old)] == old:
                path = (*new, *change.path[len(old) :])
                return Set(path, change.value) if isinstance(change, Set) else Append(path, change.value)
    return change


def not_in_force(changes: Sequence[Change], config: Mapping[str, Any]) -> list[str]:
    """Keys that containerd does not go by as they are wanted; what its version does not know at all is left out."""
    found = []
    for change in changes:
        shown = as_dumped(change, config)
        unknown = shown.path[-2:] == ("exports", "root") and config.get("version") != 3  # 1.6
        if not unknown and not holds(shown, config):
            found.append(dotted(shown.path))
    return found


def side_effects(changes: Sequence[Change], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys that changed in force though nobody wanted them to."""
    own = [as_dumped(change, after).path for change in changes]
    # A runtime that is new has all its defaults, and a file that was made is named.
    own += [
        (*path[:-1],)
        for path in own
        if "runtimes" in path or "runtime_platforms" in path or path[:2] == ("proxy_plugins", "floe")
    ]
    was, now = dict(leaves(before)), dict(leaves(after))
    moved = [
        path for path in {**was, **now} if was.get(path) != now.get(path) and path[0] not in ("imports", "version")
    ]
    return sorted(dotted(path) for path in moved if not any(_below(path, mine) for mine in own) and path != UNPACK)


def _below(path: Keys, above: Keys) -> bool:
    return path[: len(above)] == above
