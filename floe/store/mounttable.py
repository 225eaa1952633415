"""The mount table of this process's namespace, read from /proc/self/mountinfo.

Nothing here touches a mounted filesystem: a stat on a mountpoint whose server is gone may never return.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PORTABLE_TYPE = "fuse.floe-tree"  # the portable mount; the pack filesystem is a `fuse.floe`
TREE_TYPES = frozenset({"erofs", PORTABLE_TYPE})  # what a tree is mounted as
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line. `device` is (major, minor), `target` the mountpoint, `options` the superblock's."""

    device: tuple[int, int]
    root: str
    target: str
    fstype: str
    source: str
    options: str


def parse(text: str) -> list[Mount]:
    """The lines of a mountinfo file, in the order of mounting. Source: proc(5), "/proc/pid/mountinfo".

    A line of another form is left out: what somebody else mounted must not keep us from seeing our own.
    """
    mounts = []
    for line in text.split("\n"):  # of all that Python takes for line ends, the kernel escapes only this one in names
        with suppress(ValueError, IndexError):
            mounts.append(_parse(line))
    return mounts


def _parse(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    fields, rest = left.split(" "), right.split(" ")
    major, _, minor = fields[2].partition(":")
    return Mount(
        (int(major), int(minor)),
        unescape(fields[3]),
        unescape(fields[4]),
        rest[0],
        unescape(rest[1]),
        rest[2] if len(rest) > 2 else "",
    )


def mounts() -> list[Mount]:
    """This process's mounts."""
    # A mountpoint may have any bytes in its name. Not read_text: that makes a line end of a carriage return.
    return parse(Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape"))


def mounts_at(target: Path) -> list[Mount]:
    """What is mounted at exactly `target`, the visible one last. `target` must be free of symlinks."""
    text = str(target)
    return [mount for mount in mounts() if mount.target == text]


def unescape(text: str) -> str:
    r"""The text the kernel wrote with space, tab, newline and backslash as \ooo."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
