"""Sweeps of the registries for images that they deleted: one at a time in the fleet, in a thread that keeps no job waiting.

A registry that is away costs a sweep its timeouts, and nothing else of the indexer.
"""

from __future__ import annotations

import logging
import random
import threading

from floe.indexer.retention import Retention
from floe.store.errors import FloeError, UnavailableError
from floe.store.index.jobs import Queue

_log = logging.getLogger(__name__)
_NAME = "sweep"  # of the turn, and of the lease while it lasts
_LOOK = 30.0  # seconds between two looks whether it is this process's turn, where turns come less often
_PATIENCE = 3.0  # seconds that a process which stops waits for its sweep


class Sweeps:
    """`every`: seconds between the beginnings of two sweeps, whoever does them. `stop` ends them, between two images."""

    def __init__(self, retention: Retention, queue: Queue, every: float, stop: threading.Event) -> None:
        self._retention, self._queue, self._every, self._stop = retention, queue, every, stop
        self._thread = threading.Thread(target=self._run, name="registry-sweep", daemon=True)

    def start(self) -> None:
        """Look in a thread of its own until `stop` is set."""
        self._thread.start()

    def end(self) -> None:
        """Wait a moment for the thread, behind `stop`: whoever closes the store and the queue does it under nobody's hands."""
        self._thread.join(_PATIENCE)

    def turn(self) -> None:
        """Sweep when it is this process's turn. UnavailableError when the queue cannot be asked for that; the rest is logged."""
        if not self._queue.turn(_NAME, self._every):
            return
        # A sweep may take longer than a turn.
        lease = self._queue.try_lease([_NAME], self._queue.lease_seconds)
        if lease is None:
            _log.info("another indexer still looks for images that their registries deleted")
            return
        try:
            _log.info("%s", self._retention.sweep(lambda: self._stop.is_set() or lease.lost))
        except FloeError as error:  # as where this indexer may not delete: it indexes all the same
            _log.error("images that their registries deleted keep their records until the next sweep: %s", error)
        finally:
            lease.release()

    def _run(self) -> None:
        while not self._stop.is_set():
            pause = min(self._every, _LOOK)
            try:
                self.turn()
            except UnavailableError as error:
                _log.warning("%s", error)
                pause = _LOOK
            except Exception:
                _log.exception("sweeps go on after a failure")
            self._stop.wait(pause * random.uniform(0.5, 1.0))
