"""Work that others on this node shall not notice: the last to get a processor or a disk, at a bounded rate."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable

from floe.store.errors import CancelledError
from floe.store.progress import Progress

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # asm/unistd.h
_WHO_PROCESS, _CLASS_IDLE, _CLASS_SHIFT = 1, 3, 13  # linux/ioprio.h
_NICEST = 19
_BURST = 0.1  # seconds' worth of bytes that may come at once


def step_back() -> list[str]:
    """Give this thread, and those that it will start, the lowest priority for processors and disks; what could not be done."""
    problems = []
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
    except OSError as error:
        problems.append(f"niceness stays as it is: {error.strerror}")
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        problems.append(f"disk priority stays as it is: its system call on {platform.machine()} is not known")
        return problems
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _WHO_PROCESS, threading.get_native_id(), _CLASS_IDLE << _CLASS_SHIFT):
        problems.append(f"disk priority stays as it is: {os.strerror(ctypes.get_errno())}")
    return problems


class Pace:
    """A Progress that lets `rate` bytes a second pass (0: any), and stops the work when `check` raises; `shown` is told, too.

    Called under a lock by whoever reads (see Progress), so that all readers of one ingest together keep the rate.
    """

    def __init__(
        self, rate: int, check: Callable[[], None], stop: threading.Event, shown: Progress | None = None
    ) -> None:
        self._rate, self._check, self._stop, self._shown = rate, check, stop, shown
        self._due = time.monotonic()  # when what has passed would have passed at this rate

    def total(self, nbytes: int) -> None:
        """See Progress.total."""
        if self._shown is not None:
            self._shown.total(nbytes)

    def advance(self, nbytes: int) -> None:
        """See Progress.advance; CancelledError when `stop` is set meanwhile."""
        self._check()
        if self._shown is not None:
            self._shown.advance(nbytes)
        if not self._rate:
            return
        now = time.monotonic()
        self._due = max(self._due, now - _BURST) + nbytes / self._rate
        if self._due > now and self._stop.wait(self._due - now):
            raise CancelledError("seeding was stopped")
