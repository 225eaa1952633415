"""Names of a layer followed through its own symlinks, which never lead out of it."""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Iterable

from floe.store.errors import UnsupportedError
from floe.store.nodes import Node

LINKS_MAX = 255  # symlinks followed on the way to one name, as containerd's continuity/fs
STEPS_MAX = 1 << 24  # parts of all symlinks followed for a layer: some seconds; eight for each possible inode


class Steps:
    """How far the names of one layer lead through symlinks; `what` names it in errors.

    LINKS_MAX alone is no bound: a name of some hundred bytes may stand for half a million parts.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._taken = 0

    def through(self, link: bytes) -> list[bytes]:
        """The parts of a symlink's target, the last one first. UnsupportedError when the layer had its STEPS_MAX."""
        parts = link.split(b"/")
        self._taken += len(parts)
        if self._taken > STEPS_MAX:
            raise UnsupportedError(
                f"{self._what} has names that lead through symlinks of more than {STEPS_MAX} parts",
                hint="build the image again, with names that do not lead through symlinks",
            )
        parts.reverse()
        return parts


def follow(root: Node, parts: Iterable[bytes], steps: Steps, *, last: bool) -> tuple[Node, int]:
    """The node that `parts` lead to, and 0; or the one where the way ends, and how many parts are left.

    `..` above the root is the root. `last`: a symlink at the end is followed too. A way of too many symlinks ends.
    """
    nodes = [root]
    links = 0
    pending = deque(parts)
    while pending:
        part = pending[0]
        if part in (b"", b"."):
            pending.popleft()
            continue
        if part == b"..":
            pending.popleft()
            del nodes[max(1, len(nodes) - 1) :]
            continue
        child = nodes[-1].children.get(part)
        if child is None:
            break
        if stat.S_ISLNK(child.mode) and (last or len(pending) > 1):
            links += 1
            if links > LINKS_MAX:
                break
            pending.popleft()
            if child.link.startswith(b"/"):
                del nodes[1:]
            pending.extendleft(steps.through(child.link))
            continue
        pending.popleft()
        nodes.append(child)
    return nodes[-1], len(pending)
