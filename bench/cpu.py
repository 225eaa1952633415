"""Processor time: of processes, and of the whole machine. Source: proc(5), /proc/pid/stat and /proc/stat."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_IDLE = (3, 4)  # of /proc/stat's first line: idle, iowait


def of_processes(pids: Iterable[int]) -> float:
    """Seconds that these processes, and children that they waited for, spent so far, user and system."""
    seconds = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:15])) * _TICK
    return seconds


def of_machine() -> float:
    """Seconds that all processors were busy so far, interrupts and kernel threads included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks for number, ticks in enumerate(fields) if number not in _IDLE) * _TICK


def spent(work: Callable[[], object], subject: Iterable[int], server: Iterable[int]) -> tuple[float, float]:
    """Seconds of processor time that `work` costs: of this process and `subject`, and of the machine but for `server`.

    The first misses what kernel threads do, such as writing dirty pages to the disk; the second takes in all that happens
    to run, and means something on a machine that does nothing else.
    """
    own, others = (os.getpid(), *subject), list(server)
    before = of_processes(own), of_machine() - of_processes(others)
    work()
    return of_processes(own) - before[0], of_machine() - of_processes(others) - before[1]
