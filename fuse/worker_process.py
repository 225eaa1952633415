"""The worker as its keeper sees it: a process that is started or adopted, looked after, stopped and reaped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from floe.fuse import descriptors
from floe.fuse.descriptors import Descriptors
from floe.store import process

_STOP_WAIT = 8.0  # seconds a worker gets for stopping: 3 for its reads, then to close its cache
KILL_WAIT = 2.0  # seconds after SIGKILL; one stuck in the kernel is not waited for
LOOK_PAUSE = 0.5  # seconds between two looks whether it hangs
_DYING = 1.0  # seconds between a kill and the end that are no reason for worry: a large process takes some time


class WorkerProcess:
    """At most one worker of the pack filesystem in `run_dir`. `argv` starts one, `log` takes lines for people.

    `fd` is its pidfd, `ready` the read end of the pipe on which a new one says that it serves; both are -1 when there is
    none. `pid` is 0 then.
    """

    def __init__(self, run_dir: Path, argv: list[str], log: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._argv = argv
        self._log = log
        self.fd = self.ready = -1
        self.pid = 0
        self._doomed_since = 0.0  # when it was first seen killed, yet not gone; 0: it was not
        self._recorded = True  # worker.pid names it
        self._unreaped: list[int] = []  # children that hung in the kernel when they were given up

    def start(self, held: Descriptors) -> None:
        """Start one that serves `held`. OSError when the node cannot, now; nothing is left behind then."""
        pid, write_end = 0, -1
        try:
            self.ready, write_end = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
            if pid == 0:
                self._become_worker(held, write_end)
            self.fd = os.pidfd_open(pid)
        except OSError:
            if pid:
                os.kill(pid, signal.SIGKILL)
                self._unreaped.append(pid)
            self._close_ready()
            raise
        finally:
            if write_end >= 0:
                os.close(write_end)
        self._watch(pid)

    def adopt(self, pid: int) -> None:
        """Take charge of one that another keeper started, though it is no child of ours. OSError when it is gone."""
        self.fd = os.pidfd_open(pid)
        self._watch(pid)

    def _watch(self, pid: int) -> None:
        self.pid = pid
        self._doomed_since, self._recorded = 0.0, True
        self._record()

    def _record(self) -> None:
        """Write worker.pid. The worker serves all the same when that fails, and the next look tries again."""
        path = self._run_dir / descriptors.WORKER_PID
        temporary = path.with_suffix(".new")
        first, self._recorded = self._recorded, False
        try:
            temporary.write_text(f"{self.pid}\n", encoding="ascii")
            temporary.rename(path)
            self._recorded = True
        except OSError as error:
            if first:
                self._log(f"cannot write {path}: {error}")

    def _become_worker(self, held: Descriptors, ready: int) -> None:
        try:
            signal.set_wakeup_fd(-1)
            os.setsid()  # Ctrl-C is for the keeper, who then stops the worker in good order
            environment = dict(os.environ)
            environment.pop("NOTIFY_SOCKET", None)
            for key, fd in (
                (descriptors.FUSE_FD_ENV, held.fuse),
                (descriptors.SLOTS_FD_ENV, held.slots),
                (descriptors.READY_FD_ENV, ready),
            ):
                os.set_inheritable(fd, True)
                environment[key] = str(fd)
            os.execvpe(self._argv[0], self._argv, environment)  # noqa: S606 - our own arguments, no shell
        except BaseException as error:
            self._log(f"cannot start the worker {self._argv[0]}: {error}")
        finally:
            os._exit(127)

    def serves(self) -> bool:
        """What a new one said on the pipe: whether it serves. False: it died, and its pidfd says so too."""
        said = os.read(self.ready, 1) if self.ready >= 0 else b""
        self._close_ready()
        return said == b"R"

    def hangs(self) -> bool:
        """Whether it was killed, but hangs in the kernel: the pidfd tells only when every thread is gone.

        To be asked every LOOK_PAUSE seconds.
        """
        if not self._recorded:
            self._record()
        now = time.monotonic()
        if not process.is_doomed(self.pid):
            self._doomed_since = 0.0
        elif not self._doomed_since:
            self._doomed_since = now
        elif now - self._doomed_since >= _DYING:
            return True
        return False

    def kill(self) -> None:
        """End it by force; its pidfd tells when it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order, or by force when it takes too long; forget it."""
        if self.fd < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGTERM)
            if not process.ended(self.fd, _STOP_WAIT):
                self._log(f"worker {self.pid} does not stop: killing it")
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
                process.ended(self.fd, KILL_WAIT)
        self.reap()

    def reap(self) -> int | None:
        """Forget it; its wait status when it was our child and has ended."""
        status = None
        with suppress(ChildProcessError):
            pid, value = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = value
            else:
                self._unreaped.append(self.pid)
        os.close(self.fd)
        self._close_ready()
        self.fd, self.pid = -1, 0
        self._unreaped = [pid for pid in self._unreaped if not _reaped(pid)]
        return status

    def _close_ready(self) -> None:
        if self.ready >= 0:
            os.close(self.ready)
        self.ready = -1


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True
