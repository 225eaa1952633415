"""The right to wait for requests, which one serving thread has at a time (see session.py)."""

from __future__ import annotations

import threading

from floe.fuse.idle import IdleProcessors


class Lead:
    """A serving thread's hold on the right to wait for requests. Who gives it up lets processors halt again."""

    __slots__ = ("_idle", "_lock", "held")

    def __init__(self, lock: threading.Lock, idle: IdleProcessors | None = None) -> None:
        self._lock = lock
        self._idle = idle
        self.held = False

    def take(self) -> None:
        """Wait until this thread is the leader; at once when it is."""
        if not self.held:
            self._lock.acquire()
            self.held = True

    def give_up(self) -> None:
        """Let another thread lead."""
        if self.held:
            self.held = False
            if self._idle is not None and self._idle.awake:
                self._idle.let_halt()
            self._lock.release()
