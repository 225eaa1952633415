"""What an agent does, each duty in a thread of its own, so that none waits for another."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from floe.store.errors import FloeError

_log = logging.getLogger(__name__)


class Duty(Protocol):
    """One thing that an agent does again and again. `again`: seconds until it is tried again when it failed."""

    name: str
    again: float

    def turn(self) -> float:
        """Do what is due; seconds until it wants to be called again. A FloeError is logged, and it is called again later."""
        ...

    def end(self) -> None:
        """The agent stops in good order: say so to whom it concerns, if that is quickly done."""
        ...


class Running:
    """Runs `duties` from `start` on until `stop`. `ages` tells for how many seconds each has been at its present turn."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._duties = tuple(duties)
        self._stopping = threading.Event()
        self._began: dict[str, float] = {}
        self.failures = {duty.name: 0 for duty in duties}
        self._threads = [
            threading.Thread(target=self._run, args=(duty,), name=f"duty-{duty.name}", daemon=True) for duty in duties
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float) -> None:
        """End every duty that ends within `patience` seconds; the others end with the process."""
        self._stopping.set()
        until = time.monotonic() + patience
        for thread, duty in zip(self._threads, self._duties, strict=True):
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                _log.warning("%s is still under way; it ends with the process", duty.name)
                continue
            try:
                duty.end()
            except FloeError as error:
                _log.info("%s: %s", duty.name, error)

    def ages(self) -> dict[str, float]:
        """Seconds, by duty; 0 between two turns."""
        now, began = time.monotonic(), dict(self._began)
        return {duty.name: now - began[duty.name] if duty.name in began else 0.0 for duty in self._duties}

    def _run(self, duty: Duty) -> None:
        failing = False
        while not self._stopping.is_set():
            self._began[duty.name] = time.monotonic()
            try:
                pause = duty.turn()
                if failing:
                    _log.info("%s: works again", duty.name)
                failing = False
            except Exception as error:
                self.failures[duty.name] += 1
                if not failing:  # said once
                    trace = None if isinstance(error, FloeError) else error
                    _log.warning("%s: %s; it is tried again", duty.name, error, exc_info=trace)
                pause, failing = duty.again, True
            self._began.pop(duty.name, None)
            # Jitter: what made all nodes fail together must not have them all come back together.
            self._stopping.wait(pause * random.uniform(0.8, 1.2))
