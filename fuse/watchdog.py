"""The keeper's watchdog: tells when a living worker has stopped answering, and sees to it that a request pays for its own deeds.

What is watched is the read path itself. The thread that asks the kernel for requests leaves its pulse in the slots, each time and
once a second when nothing comes; it is missing when no thread asks any more. And each slot shows how long its request has been there.
A timer thread would tick on beside threads that hang.

Time is counted in looks, of which none counts for more than a second: when the machine, or this process, did not run, nobody
was silent. A silent worker that runs, or waits for the disk, gets more time than one that does neither.
"""

from __future__ import annotations

import signal
import time

from floe.fuse import marks, slots
from floe.store import process

_LOOK_MAX = 1.0  # seconds that a look counts for at most
_STOPPED = 3.0  # seconds that a worker may be stopped by a signal
_SILENT = 10.0  # seconds without a pulse, when all threads sleep
_SILENT_BUSY = 60.0  # the same while one runs, wants to, waits for a disk or for memory, or is debugged
_STARTING = 120.0  # seconds until a new one begins to serve
_GRACE = 30.0  # seconds beyond the time within which the worker says it answers every request
_SCAN = 5.0  # seconds between looks at the slots
# Signals that a process draws upon itself.
_FAULTS = {signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS}


class Watchdog:
    """Watches one worker after the other through the slots `fd`. Nothing in it blocks."""

    def __init__(self) -> None:
        self.watch(0, -1, adopted=True)

    def watch(self, pid: int, fd: int, *, adopted: bool) -> None:
        """Begin with another worker. An `adopted` one may be of a version that has no pulse, as may one that serves."""
        self._pid, self._fd = pid, fd
        self._serves = adopted
        self._last = time.monotonic()
        self._pulse = 0
        self._stopped = self._silent = self._starting = self._scanned = 0.0
        self._ages: dict[int, tuple[int, float]] = {}  # by slot: `unique`, seconds
        self._late: dict[int, int] = {}  # `unique` by slot, of requests that the worker did not answer in time
        self._oom_kills = process.oom_kills()
        self._innocent = False  # the worker was killed, but no request is to blame

    def serves(self) -> None:
        """The worker said that it serves."""
        self._serves = True

    def look(self) -> str | None:
        """To be asked once or twice a second: why the worker must be killed, or None."""
        now = time.monotonic()
        lapse, self._last = min(now - self._last, _LOOK_MAX), now
        self._stopped = self._stopped + lapse if process.is_stopped(self._pid) else 0.0
        if self._stopped >= _STOPPED:
            self._innocent = True
            return f"is stopped by a signal for {self._stopped:.0f} s"
        pid, pulse, patience = slots.vitals(self._fd)
        if pid != self._pid:
            self._starting += lapse
            late = not self._serves and self._starting >= _STARTING
            return f"has not begun to serve for {self._starting:.0f} s" if late else None
        return self._silence(pulse, lapse) or self._overdue(patience, lapse)

    def _silence(self, pulse: int, lapse: float) -> str | None:
        if pulse != self._pulse:
            self._pulse, self._silent = pulse, 0.0
            return None
        self._silent += lapse
        if self._silent < _SILENT or (self._silent < _SILENT_BUSY and process.is_busy(self._pid)):
            return None
        return f"has asked for no request for {self._silent:.0f} s"

    def _overdue(self, patience: float, lapse: float) -> str | None:
        """Whether requests lie longer in their slots than the worker promises. They will be answered with an error."""
        self._scanned += lapse
        if self._scanned < _SCAN or not patience:
            return None
        passed, self._scanned = self._scanned, 0.0
        ages = {}
        for slot, unique in slots.occupied(self._fd):
            known, age = self._ages.get(slot, (0, 0.0))
            ages[slot] = unique, age + passed if known == unique else 0.0
        self._ages = ages
        self._late = {slot: unique for slot, (unique, age) in ages.items() if age >= patience + _GRACE}
        self._innocent = self._innocent or bool(self._late)
        return f"has not answered {len(self._late)} requests within {patience + _GRACE:.0f} s" if self._late else None

    def ended(self, code: int | None, *, silent: bool) -> None:
        """Mark what was under way when the worker ended: with an exit code, by a signal (negative), or nobody knows (None).

        `silent`: it was killed for what `look` said.
        """
        began = slots.vitals(self._fd)[0] == self._pid
        mark = marks.blamed if began and self._at_fault(code, silent=silent) else marks.absolved
        found = slots.marks(self._fd)
        for slot, unique in slots.occupied(self._fd):
            changed = marks.OVERDUE if self._late.get(slot) == unique else mark(found[slot])
            if changed != found[slot]:
                slots.set_mark(self._fd, slot, changed)

    def _at_fault(self, code: int | None, *, silent: bool) -> bool:
        if silent:
            return not self._innocent
        if code == -signal.SIGKILL:
            return process.oom_kills() > self._oom_kills  # else somebody killed it, which is no request's doing
        return code is not None and (code > 0 or -code in _FAULTS)
