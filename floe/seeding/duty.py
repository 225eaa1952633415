"""Seeding as one of the things that a node's agent does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from floe.seeding.seeder import Seeder

_LOOK = 30.0  # seconds between two looks whether it is at work
_PATIENCE = 3.0  # seconds that an agent which stops waits for it


class Seeding:
    """A duty (see floe.agent.duties). An image may take an hour, and no turn may: a thread of its own seeds, and is begun again if it ends.

    `opened` gives the Seeder; what it raises is the duty's failure.
    """

    name = "seeding"
    again = 60.0

    def __init__(self, opened: Callable[[], AbstractContextManager[Seeder]]) -> None:
        self._opened = opened
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def turn(self) -> float:
        """See Duty.turn."""
        if self._stop.is_set() or (self._thread is not None and self._thread.is_alive()):
            return _LOOK
        stack = contextlib.ExitStack()
        seeder = stack.enter_context(self._opened())
        self._thread = threading.Thread(target=self._run, args=(stack, seeder), name="seeding", daemon=True)
        self._thread.start()
        return _LOOK

    def end(self) -> None:
        """See Duty.end: what is under way names nothing, and its lease ends."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _run(self, stack: contextlib.ExitStack, seeder: Seeder) -> None:
        with stack:
            seeder.run(self._stop)
