"""What a check says, and what checks look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"
LEVELS = (OK, SKIPPED, WARNING, ERROR)  # the worst last


@dataclass(frozen=True)
class Finding:
    """`level`: one of LEVELS; `mend`: the command, or what to do, that mends it; empty for what is well."""

    check: str
    level: str
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Node:
    """The settings that matter, absolute paths, and who asks the daemons.

    `cache_dirs`: all of the node cache, at least one. `packfs` and `snapshotter` answer with `running` and `state`, `index` with what floe.store.index.status says of `url`.
    `role`: reader or writer, whose needs decide. `may_write`: probes may put files and objects, and remove them again.
    """

    store: str
    index: str
    cache_dirs: tuple[Path, ...]
    run_dir: Path
    root: Path
    socket: Path
    min_free: Callable[[int], int]  # of a disk's bytes
    read_deadline: float
    trusted_keys: tuple[str, ...]
    signing_key: Path | None
    packfs: Callable[[], dict[str, Any]]
    snapshotter: Callable[[], dict[str, Any]]
    index_state: Callable[[], dict[str, Any]]
    index_denied: Callable[[bool], list[str]]  # with what writes, or without
    notes_denied: Callable[[], list[str]]  # of what an agent writes
    agent: Callable[[], tuple[bool, int | None]]  # whether one was ever here, and the process of one that lives
    role: str
    may_write: bool
    containerd_config: Path
    containerd: Path | None  # the program; None: the one on the PATH
