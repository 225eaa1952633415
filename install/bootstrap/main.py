"""From the command line to the exit status."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bootstrap import flags, hostroot, install, plan, uninstall
from bootstrap.errors import INTERRUPTED, NodeError, UsageError
from bootstrap.flags import Options
from bootstrap.record import Record

_LOCK = Path("/run/floe-bootstrap.lock")


def main(arguments: Sequence[str]) -> int:
    """Run a command line; its exit status: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    try:
        options = flags.parse(arguments)
        _check_root()
        if options.host_root is not None:
            return hostroot.enter(options, arguments)
        with _locked(boot=options.boot) as free:
            return _run(options) if free else 0
    except NodeError as error:
        for number, line in enumerate(str(error).split("\n")):
            _tell("error: " * (number == 0) + line)
        if error.hint:
            _tell(f"hint: {error.hint}")
        return error.code
    except KeyboardInterrupt:
        _tell("interrupted; run it again, and it goes on from there")
        return INTERRUPTED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _tell(f"error: {name}{error.strerror or error}")
        return 1


def _check_root() -> None:
    if os.geteuid() != 0:
        raise NodeError("this needs root", "run it again with sudo")


@contextlib.contextmanager
def _locked(*, boot: bool) -> Iterator[bool]:
    """One at a time. At a boot nobody else is there; else the one that is there has started our unit, and does the work."""
    while True:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not boot:
                    raise NodeError("another bootstrap-node.sh runs", "wait for it to end") from None
                yield False
                return
            if not _is_at(fd, _LOCK):
                continue  # of one that has just ended, and took the file away
            try:
                yield True
            finally:
                _LOCK.unlink()  # while it is held, so that nobody's is taken away
            return
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether a file still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _run(options: Options) -> int:
    record = Record()
    if options.boot:
        return install.boot(record)
    if options.uninstall:
        return _uninstall(options, record)
    planned = plan.make(options, record)
    lines = plan.describe(planned, options, changes=True)
    if options.dry_run:
        _report(options, {"would": lines, "notes": planned.notes, "warnings": planned.warnings, "exit_status": 0})
        return 0
    _ask(options, lines, planned.notes, planned.warnings)
    report = install.install(planned, options, record)
    _report(options, report)
    code = report["exit_status"]
    assert isinstance(code, int)
    return code


def _uninstall(options: Options, record: Record) -> int:
    lines = uninstall.describe(record)
    if options.dry_run or not lines:
        _report(
            options,
            {
                "would": lines,
                "notes": [] if lines else ["nothing was done here: there is nothing to undo"],
                "exit_status": 0,
            },
        )
        return 0
    uninstall.check(record)
    _ask(options, lines, [], [])
    _report(options, uninstall.uninstall(record))
    return 0


def _ask(options: Options, lines: list[str], notes: list[str], warnings: list[str]) -> None:
    """Show what will be done, and have a yes for it. NodeError for a no; UsageError where nobody can be asked."""
    if options.yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("there is no terminal to ask at", "give --yes; --dry-run shows what would be done")
    for line in lines:
        sys.stderr.write(f"  {line}\n")
    for line in notes:
        sys.stderr.write(f"  note: {line}\n")
    for line in warnings:
        sys.stderr.write(f"  warning: {line}\n")
    sys.stderr.write("Go on? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise NodeError("nothing was done", "answer y, or give --yes")


def _report(options: Options, report: dict[str, object]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    for key, sign in (
        ("would", "would "),
        ("done", ""),
        ("notes", "note: "),
        ("warnings", "warning: "),
        ("next", "next: "),
    ):
        lines = report.get(key, [])
        assert isinstance(lines, list)
        for line in lines:
            sys.stdout.write(f"{sign}{line}\n")
    sys.stdout.flush()


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"bootstrap-node: {text}\n")
        sys.stderr.flush()
