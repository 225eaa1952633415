"""Deletes a directory and all in it, however deep it is.

`shutil.rmtree` calls itself for each level (Python 3.11): a container that makes a thousand nested directories would
end it with a RecursionError. Here one descriptor walks down and, by `..`, up again: depth costs a name in memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class _Level:
    """A directory on the way down: `inode` is (st_dev, st_ino), `below` the directories seen in it."""

    name: str
    inode: tuple[int, int]
    below: list[str] = field(default_factory=list)


def remove_tree(directory: Path, check: Callable[[], None]) -> None:
    """Delete `directory` without following links; gone is fine. OSError, and whatever `check` raises.

    `check` is called before each entry: it says by an exception that this must end now.
    """
    try:
        here = os.open(directory, _OPEN)
    except FileNotFoundError:
        return
    try:
        levels = [_Level(directory.name, _inode(here))]
        while levels:
            level = levels[-1]
            if level.below or _clear(here, level.below, check):
                if not level.below:
                    continue  # files only; look again, for what appeared or was skipped while they were deleted
                name = level.below.pop()
                here = _step(here, name)
                levels.append(_Level(name, _inode(here)))
                continue
            here = _step(here, "..")
            levels.pop()
            if levels and _inode(here) != levels[-1].inode:
                raise OSError(errno.ESTALE, "a directory was moved away while it was deleted", level.name)
            os.rmdir(level.name, dir_fd=here)
    finally:
        os.close(here)


def _step(here: int, name: str) -> int:
    """Go to a directory beside, and leave the one before."""
    there = os.open(name, _OPEN, dir_fd=here)
    os.close(here)
    return there


def _clear(here: int, below: list[str], check: Callable[[], None]) -> bool:
    """Delete the files of a directory and add its directories to `below`; whether anything was there."""
    found = False
    with os.scandir(here) as entries:
        for entry in entries:
            check()
            found = True
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=here)
    return found


def _inode(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino
