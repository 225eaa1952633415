"""What a configuration stands for together with the files it imports, as containerd puts them together.

1.x: a plugin's table, and a proxy plugin's, of a later file replaces the whole table of an earlier one. 2.x: tables are
merged key by key, and a later list replaces an earlier one, but for the lists of plugins, which are joined. Seen with
`config dump` of 1.6.20 and 2.1.9.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.containerd.document import parse
from floe.containerd.version import Version
from floe.containerd.wanted import Keys, lookup
from floe.store.errors import AccessDeniedError, BadInputError, NotFoundError

_JOINED = ("disabled_plugins", "required_plugins")
_WHOLE = ("plugins", "proxy_plugins", "stream_processors")  # of 1.x: tables whose entries are replaced as a whole


@dataclass(frozen=True)
class Source:
    """A file and what it says."""

    path: Path
    config: dict[str, Any]


@dataclass(frozen=True)
class Effective:
    """`config`: all `sources` together, the main file first."""

    config: dict[str, Any]
    sources: tuple[Source, ...]

    def last(self, path: Keys) -> Path | None:
        """The file that has the last word about a key."""
        saying = [source.path for source in self.sources if lookup(source.config, path) is not None]
        return saying[-1] if saying else None

    def replacing(self, path: Keys) -> Path | None:
        """The last file that has the table which a 1.x replaces as a whole."""
        return self.last(path[:2])


def read_text(path: Path) -> str:
    """A file of containerd's configuration. NotFoundError, AccessDeniedError, BadInputError."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint="check --containerd-config") from None
    except PermissionError as error:
        raise AccessDeniedError(f"cannot read {path}: {error.strerror}", hint="run as root") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read {path}: {error}", hint="check --containerd-config") from error


def effective(main: Path, version: Version, edited: Mapping[Path, str] | None = None) -> Effective:
    """All that `main` stands for; `edited` has the texts of files as they would be. BadInputError, NotFoundError."""
    texts = edited or {}
    sources: list[Source] = []
    waiting, seen = [main], set()
    while waiting:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        source = Source(path, parse(texts[path] if path in texts else read_text(path), path))
        sources.append(source)
        waiting += _imports(source)
    config: dict[str, Any] = {}
    for source in sources:
        merge(config, source.config, deep=version.is_2)
    return Effective(config, tuple(sources))


def _imports(source: Source) -> list[Path]:
    named = source.config.get("imports") or []
    found: list[Path] = []
    for pattern in named:
        place = str(Path(source.path.parent, str(pattern)))
        if glob.has_magic(place):
            found += sorted(Path("/").glob(place.lstrip("/")))  # hidden files too, as in Go
        else:
            found.append(Path(place))
    return found


def merge(into: dict[str, Any], more: Mapping[str, Any], *, deep: bool, level: int = 0) -> None:
    """Add a later file's keys. `deep`: tables are merged at all depths."""
    for key, value in more.items():
        there = into.get(key)
        if level == 0 and key in _JOINED:
            into[key] = list(dict.fromkeys([*(there or []), *(value or [])]))
        elif isinstance(there, dict) and isinstance(value, Mapping) and (deep or (level == 0 and key in _WHOLE)):
            merge(there, value, deep=deep, level=level + 1)
        else:
            into[key] = copy.deepcopy(value)
