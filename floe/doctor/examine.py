"""All checks, at the same time, each waited for only so long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from floe.doctor import daemons, disk, kernel, keys, remote, units
from floe.doctor.finding import ERROR, WARNING, Finding, Node
from floe.store.errors import FloeError

Check = Callable[[Node], Iterable[Finding]]

CHECKS: dict[str, Check] = {
    "kernel": lambda _: kernel.features(),
    "fuse timeout": kernel.fuse_timeout,
    "file-backed EROFS": kernel.short_files,
    "own files": daemons.own_files,
    "daemons": daemons.running,
    "agent": daemons.agent,
    "systemd units": units.units,
    "directories": daemons.directories,
    "containerd": daemons.containerd,
    "store": remote.store,
    "credentials": remote.credentials,
    "keys": keys.keys,
    "clock": remote.clock,
    "index": remote.index,
    "cache disk": disk.kind,
}
# Alone, after the others: they would be in each other's way.
MEASUREMENTS: dict[str, Check] = {"cache disk speed": disk.speed}


def examine(
    node: Node, seconds: float, done: Callable[[str], None] = lambda _: None, *, measure: bool = True
) -> list[Finding]:
    """What there is to say, in the order of the checks. Within some `seconds`, and as much again for measurements (`measure`).

    A check that is not done by then is said to be skipped; `done` hears of each that is.
    """
    found: list[Finding] = []
    for checks in (CHECKS, MEASUREMENTS) if measure else (CHECKS,):
        found += _at_once(checks, node, seconds, done)
    return found


def _at_once(checks: dict[str, Check], node: Node, seconds: float, done: Callable[[str], None]) -> Iterator[Finding]:
    answers: dict[str, list[Finding]] = {name: [] for name in checks}
    ended: set[str] = set()

    def run(name: str, check: Check) -> None:
        try:
            answers[name] = list(check(node))
        except FloeError as error:
            answers[name] = [Finding(name, ERROR, str(error), error.hint or "see what the message names")]
        except Exception as error:
            answers[name] = [Finding(name, ERROR, f"the check failed: {type(error).__name__}: {error}", "report this")]
        ended.add(name)

    threads = {
        # Daemon threads: one that hangs must not keep the process from ending.
        name: threading.Thread(target=run, args=(name, check), name=f"doctor-{name}", daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + seconds
    for name, thread in threads.items():
        thread.join(max(0.0, until - time.monotonic()))
        if name in ended:
            done(name)
            yield from answers[name]
        else:
            text = f"not done within {seconds:g} s, and left"
            yield Finding(name, WARNING, text, "see whether what it asks answers, or give more --seconds")


def exit_code(found: Sequence[Finding]) -> int:
    """0: nothing to mend; 1: errors; 3: warnings only. What was skipped counts for nothing."""
    levels = {finding.level for finding in found}
    return 1 if ERROR in levels else 3 if WARNING in levels else 0
