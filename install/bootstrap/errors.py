"""What keeps a node from being made: what failed, on what, and in `hint` what to do next."""

from __future__ import annotations

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class NodeError(Exception):
    """It failed, or the node's state forbids it. Exit status 1."""

    code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(NodeError):
    """What was given cannot be used as it is; nothing was changed. Exit status 2."""

    code = USAGE
