"""What `floe doctor` finds, for a page that is asked once a second: looked for now and then, by a thread that nobody waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from floe.cli.problems import Problem
from floe.cli.settings import Settings
from floe.doctor.finding import ERROR, WARNING, Finding

_SECONDS = 20.0  # for the checks of one look
_AGAIN = 600.0  # seconds between two looks
_AGAIN_SOON = 60.0  # the same while there is something to mend: who mends it wants to see it gone
# What a page knows by itself, and sooner.
_FOLLOWED = ("packfs", "snapshotter", "index")
_log = logging.getLogger(__name__)


class Examined:
    """The findings of the last look that `look` gave; a new one is begun by who asks when it is time. Thread-safe."""

    def __init__(self, look: Callable[[], Sequence[Finding]]) -> None:
        self._look = look
        self._lock = threading.Lock()  # guards what follows
        self._found: list[Problem] = []
        self._at: float | None = None  # since 1970, of the last look that ended
        self._next = -float("inf")
        self._running = False

    def problems(self) -> list[Problem]:
        """Warnings and errors, each with what mends it; at once."""
        with self._lock:
            if not self._running and time.monotonic() >= self._next:
                self._running = True
                threading.Thread(target=self._run, name="floe-examine", daemon=True).start()
            return list(self._found)

    @property
    def at(self) -> float | None:
        """When the last look ended, in seconds since 1970; None: none has."""
        with self._lock:
            return self._at

    def _run(self) -> None:
        try:
            found = [
                Problem(one.level, f"{one.check}: {one.text}", one.mend)
                for one in self._look()
                if one.level in (ERROR, WARNING) and one.check not in _FOLLOWED
            ]
        except Exception:
            _log.exception("floe doctor failed, and is tried again later")
            found = []
        with self._lock:
            self._found, self._at, self._running = found, time.time(), False
            self._next = time.monotonic() + (_AGAIN_SOON if found else _AGAIN)


def examined(settings: Settings) -> Examined:
    """What concerns a reader on this node. No speed is measured and nothing written."""

    def look() -> Sequence[Finding]:
        from floe.cli.doctor import node_of  # noqa: PLC0415 - lazy: the page is there before it
        from floe.doctor.examine import examine  # noqa: PLC0415 - likewise

        return examine(node_of(settings), _SECONDS, measure=False)

    return Examined(look)
