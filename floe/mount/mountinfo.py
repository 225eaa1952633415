"""/proc/self/mountinfo, parsed. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class MountEntry:
    """One mount of this mount namespace. `device` is `major:minor` of the superblock, as st_dev gives it."""

    mount_id: int
    device: str
    root: str
    target: str
    options: frozenset[str]
    shared: bool
    fstype: str
    source: str
    super_options: frozenset[str]


def read_mounts(text: str | None = None) -> list[MountEntry]:
    """All mounts, in the order they were made; of two on one target the later one covers the earlier.

    A line of another form is left out: what somebody else mounted must not keep us from seeing our own.
    """
    if text is None:
        # Not read_text: that makes a line end of a carriage return, which a name may hold.
        text = Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape")
    mounts = []
    for line in text.split("\n"):  # of all that Python takes for line ends, the kernel escapes only this one in names
        with suppress(ValueError):
            mounts.append(_parse(line))
    return mounts


def mount_at(target: str, mounts: list[MountEntry]) -> MountEntry | None:
    """The mount seen at `target` (absolute, no symlinks in it), or None when nothing is mounted there."""
    return next((entry for entry in reversed(mounts) if entry.target == target), None)


def _parse(line: str) -> MountEntry:
    head, _, tail = line.partition(" - ")
    mount_id, _, device, root, target, options, *tags = head.split(" ")
    fstype, source, super_options = tail.split(" ", 2)
    return MountEntry(
        mount_id=int(mount_id),
        device=device,
        root=_unescape(root),
        target=_unescape(target),
        options=frozenset(options.split(",")),
        shared=any(tag.startswith("shared:") for tag in tags),
        fstype=fstype,
        source=_unescape(source),
        super_options=frozenset(super_options.split(",")),
    )


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)  # space, tab, newline, backslash and #: all ASCII
