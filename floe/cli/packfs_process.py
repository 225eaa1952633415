"""A pack filesystem started for the mounts of models, where no daemon runs: start it, and stop it after the last.

`<run_dir>/packfs.started` names the keeper that was started here, so that one started by anybody else, systemd for
example, is never stopped.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from pathlib import Path

from floe.cli import output
from floe.cli.node import read_pid, snapshotter_status
from floe.cli.packfs import WORKER_KEYS
from floe.cli.settings import Settings
from floe.protos.packfs_control import PackfsClient
from floe.store.errors import DeadlineError, UnavailableError

MARK, LOG = "packfs.started", "packfs.log"
# Seconds until a started pack filesystem must answer, until a stopped one must be gone, and between looks.
_START, _STOP, _POLL = 20.0, 15.0, 0.05


def is_running(run_dir: Path) -> bool:
    """Whether a worker answers."""
    try:
        PackfsClient(run_dir).ping()
    except UnavailableError:
        return False
    return True


def start(settings: Settings) -> None:
    """Start a pack filesystem that outlives this process, and wait until it answers.

    UnavailableError with the end of its log when it ends instead, DeadlineError when it stays silent.
    """
    log = settings.run_dir / LOG
    argv = [sys.executable, "-m", "floe", "packfs", *settings.as_flags(*WORKER_KEYS)]
    # It is nobody's service: systemd must not take its messages for those of who called us.
    environ = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(sys.executable, argv, environ, file_actions=files, setsid=True)
    (settings.run_dir / MARK).write_text(f"{pid}\n")
    until = time.monotonic() + _START
    while not is_running(settings.run_dir):
        if _has_ended(pid):
            raise UnavailableError(f"the pack filesystem did not start: {_last_line(log)}", hint=f"see {log}")
        if time.monotonic() > until:
            os.kill(pid, signal.SIGTERM)
            raise DeadlineError(f"the pack filesystem did not answer within {_START:g} s", hint=f"see {log}")
        time.sleep(_POLL)


def stop(run_dir: Path) -> bool:
    """Stop the pack filesystem that `start` left in `run_dir`; False when there is none, or a snapshotter uses it.

    DeadlineError when it does not end.
    """
    mark = run_dir / MARK
    pid = read_pid(mark)
    if pid is None or pid != read_pid(run_dir / "keeper.pid"):
        mark.unlink(missing_ok=True)
        return False
    if snapshotter_status(run_dir)["running"]:
        output.note(f"the pack filesystem, process {pid}, runs on for the snapshotter")
        return False
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        mark.unlink(missing_ok=True)
        return False
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not select.select([fd], [], [], _STOP)[0]:
            raise DeadlineError(
                f"the pack filesystem, process {pid}, did not end within {_STOP:g} s",
                hint="`floe status` shows which mounts still use it",
            )
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
    finally:
        os.close(fd)
    mark.unlink(missing_ok=True)
    return True


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    told = [line for line in lines if line.strip() and not line.startswith("floe: hint:")]
    return told[-1].removeprefix("floe: error: ") if told else "it ended without a word"
