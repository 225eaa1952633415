"""The keeper: holds the mount's descriptors, and sees that a worker serves them. One thread, no network.

Run as `python -m floe.fuse.keeper --run-dir DIR [--force] -- WORKER ARGUMENTS`, which `floe packfs` becomes.

Starting, on a run directory where
- nobody holds the mount: whatever is left of one is detached (its trees stay broken; containers on them must
  restart) and a new one made;
- a keeper runs: refused with exit code 1, naming it. With --force it is ended instead;
- a keeper was stopped with packs in use: it hands the mount over and ends; reads that waited go on;
- only a worker lives (the keeper was killed): the mount is copied out of it (pidfd_getfd) and the worker adopted, or
  replaced when it was killed and hangs in the kernel;
- systemd kept the descriptors (FileDescriptorStoreMax=2): they are taken back. Started otherwise than by systemd meanwhile:
  refused with exit code 1, since only systemd can hand them over.

SIGTERM or SIGINT: with no pack in use, unmount and end with 0. Otherwise stop the worker, give up the run
directory but stay, holding the mount: reads wait in the kernel until the next `floe packfs`, and this process ends
by itself when the last pack is closed. With --force, on SIGUSR2, or when the machine goes down and all units are stopped: end
though packs are in use; readers get errors.
Under systemd this wants KillMode=process and SendSIGKILL=no.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from floe.fuse import descriptors, slots
from floe.fuse.descriptors import Descriptors
from floe.fuse.watchdog import Watchdog
from floe.fuse.worker_process import KILL_WAIT, LOOK_PAUSE, WorkerProcess
from floe.store import process
from floe.store.errors import BusyError, FloeError, UnsupportedError

_NAME = "floe packfs"
_CLAIM_WAIT = 1.0  # seconds; a stopped keeper claims the directory for moments when it looks whether it may end
_FORCE_WAIT = 15.0  # seconds another keeper gets to end
_LOOK_AGAIN = 2.0  # seconds between a stopped keeper's looks whether packs are still in use
_GOOD_LIFE = 2.0  # seconds a worker must have lived for its death to count as an accident
_BACKOFF_FIRST, _BACKOFF_LAST = 0.1, 5.0  # seconds
_HOPELESS = 3  # workers that never served, before a new mount is given up
_HANDED_OVER, _END_BY_FORCE = signal.SIGUSR1, signal.SIGUSR2


def _log(message: str) -> None:
    process.log(_NAME, message)


def run_keeper(run_dir: Path, worker_argv: list[str], *, force: bool = False) -> int:
    """Keep the pack filesystem of `run_dir` until told to end; the process's exit code. Call in the main thread."""
    run_dir = run_dir.absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir = run_dir.resolve()
        process.refuse_own_mount(run_dir)
        try:
            owned = process.own_directory(run_dir, "keeper", wait=_CLAIM_WAIT)
        except BusyError:
            if force and _end_other(_pid_in(run_dir / "keeper.pid")):
                return 0
            raise
        if force and _holds_mount(run_dir, owned.previous):
            owned.release(remove=False)
            return 0 if _end_other(owned.previous) else 1
        for problem in process.harden():
            _log(problem)
        return _Keeper(run_dir, worker_argv, owned, force=force).run()
    except FloeError as error:
        _log(f"{error}; {error.hint}" if error.hint else str(error))
        return 1
    except OSError as error:
        _log(f"cannot keep {run_dir}: {error}")
        return 1


def _pid_in(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _holds_mount(run_dir: Path, pid: int | None) -> bool:
    """Whether process `pid` holds the descriptors of the mount that is there now."""
    device = descriptors.mounted_device(run_dir)
    if pid is None or pid == os.getpid() or device is None:
        return False
    try:
        held = descriptors.take_from(pid, device)
    except UnsupportedError:  # of another version
        return True
    if held is None:
        return False
    os.close(held.fuse)
    os.close(held.slots)
    return True


def _end_other(pid: int | None) -> bool:
    """Have another keeper end by force; whether it did."""
    try:
        pidfd = os.pidfd_open(pid or 0)
    except (OSError, ValueError):
        return True
    try:
        signal.pidfd_send_signal(pidfd, _END_BY_FORCE)
        return process.ended(pidfd, _FORCE_WAIT)
    finally:
        os.close(pidfd)


class _Keeper:
    def __init__(self, run_dir: Path, worker_argv: list[str], owned: process.OwnedDirectory, *, force: bool) -> None:
        self._run_dir = run_dir
        self._owned = owned
        self._force = force
        self._held = Descriptors(-1, -1, (0, 0))
        self._fresh = False  # nobody has ever served this mount
        self._stopped = False
        self._worker = WorkerProcess(run_dir, worker_argv, _log)
        self._watchdog = Watchdog()
        self._killed = False  # the worker, because it did not answer
        self._served = False
        self._started = 0.0
        self._failures = 0  # workers that died young, in a row
        self._next_start = 0.0
        self._heartbeat = process.Heartbeat()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> int:
        signal.set_wakeup_fd(self._waker)
        for number in (signal.SIGTERM, signal.SIGINT, _HANDED_OVER, _END_BY_FORCE, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        passed = process.listen_fds()
        try:
            self._acquire(passed)
        except (BusyError, UnsupportedError):
            self._owned.hand_back()
            raise
        # Who starts us may have held it back until here; see install/systemd/floe-packfs.service. A worker inherits the mask.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        while True:
            self._heartbeat.beat()
            code = None
            if self._worker.fd < 0 and not self._stopped and time.monotonic() >= self._next_start:
                code = self._start_worker()
            if code is None:
                code = self._step()
            if code is not None:
                return code

    def _step(self) -> int | None:
        """Wait for something and deal with it; an exit code when it is over."""
        poller = select.poll()
        for fd in (self._wake, self._worker.fd, self._worker.ready):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        limit = math.inf if self._heartbeat.pause is None else self._heartbeat.pause / 2
        events = {fd for fd, _ in poller.poll(1000 * min(limit, self._timeout()))}
        if self._worker.ready in events and self._worker.serves():
            self._worker_serves()
        if self._wake in events:
            for number in os.read(self._wake, 64):
                code = self._signalled(number)
                if code is not None:
                    return code
        if self._worker.fd >= 0 and (self._worker.fd in events or self._worker.hangs()):
            return self._worker_died(hangs=self._worker.fd not in events)
        if self._worker.fd >= 0 and not self._killed and (why := self._watchdog.look()):
            _log(f"worker {self._worker.pid} {why}: killing it")
            slots.count(self._held.slots, "silent")
            self._killed = True
            self._worker.kill()
        if self._stopped and not events and self._may_end():
            _log("packs are no longer in use: ending")
            return self._goodbye()
        return None

    def _timeout(self) -> float:
        """Seconds after which there is something to look at, whatever happens."""
        if self._stopped:
            return _LOOK_AGAIN
        if self._worker.fd < 0:
            return max(0.0, self._next_start - time.monotonic())
        return LOOK_PAUSE

    def _signalled(self, number: int) -> int | None:
        if number == _HANDED_OVER and self._stopped:
            _log("handed the mount over")
            return 0
        told = number in (signal.SIGTERM, signal.SIGINT)
        if number == _END_BY_FORCE or (told and (self._force or process.machine_ends())):
            _log("ending by force: readers of packs in use get errors")
            descriptors.detach(self._run_dir)
            self._worker.stop()
            return self._goodbye()
        return self._stop() if told else None

    def _stop(self) -> int | None:
        process.sd_notify("STOPPING=1")
        if (self._may_end if self._stopped else self._unmount)():
            self._worker.stop()
            return self._goodbye()
        if not self._stopped:
            self._worker.stop()
            self._stopped = True
            self._owned.release(remove=False)
        message = (
            f"packs are in use: the worker is stopped, the keeper stays (process {os.getpid()}) and reads wait; "
            "start `floe packfs` again to go on, or end it with `floe packfs --force`"
        )
        _log(message)
        process.sd_notify(f"STATUS={message}")
        return None

    def _unmount(self) -> bool:
        try:
            return descriptors.unmount(self._run_dir)
        except OSError as error:
            _log(f"cannot unmount: {error}")
            return False

    def _may_end(self) -> bool:
        """Whether a stopped keeper could unmount: only while nobody is taking over."""
        try:
            self._owned = process.own_directory(self._run_dir, "keeper")
        except (BusyError, OSError):
            return False
        if self._unmount():
            return True
        self._owned.release(remove=False)
        return False

    def _goodbye(self) -> int:
        descriptors.drop_from_systemd()
        for name in (descriptors.WORKER_PID, descriptors.KNOWN, "packfs.sock"):
            (self._run_dir / name).unlink(missing_ok=True)
        self._owned.release()
        return 0

    # --- the mount --------------------------------------------------------------------------------

    def _acquire(self, passed: dict[str, int]) -> None:
        """Find who holds the mount, or make one; adopt its worker."""
        device = descriptors.mounted_device(self._run_dir)
        worker = _pid_in(self._run_dir / descriptors.WORKER_PID)
        held = descriptors.from_named(passed, device)
        source = "systemd"
        for pid in (self._owned.previous, worker):
            if held is None and device is not None and pid not in (None, os.getpid()):
                assert pid is not None
                held, source = descriptors.take_from(pid, device), f"process {pid}"
        if held is None:
            if device is not None and not self._force:
                self._leave_to_its_holder(worker)
            self._mount()
            return
        self._held = held
        _log(f"took the mount over from {source}")
        descriptors.store_in_systemd(held)
        self._adopt(worker)
        self._dismiss(self._owned.previous)

    def _leave_to_its_holder(self, worker: int | None) -> None:
        """BusyError when somebody unknown keeps the mount alive. One held by a killed process that hangs can be had by nobody."""
        hanging = any(pid is not None and process.hangs_doomed(pid) for pid in (self._owned.previous, worker))
        if not hanging and descriptors.is_held(self._run_dir):
            raise BusyError(
                f"the pack filesystem mounted below {self._run_dir} is held by another process, systemd perhaps",
                hint="start its service (systemctl start floe-packfs), which hands it over; or end it with `floe packfs --force`, "
                "and its readers get errors",
            )

    def _mount(self) -> None:
        if descriptors.mounted_device(self._run_dir) is not None:
            _log("nobody holds the mount that was here: detaching it; what is mounted over it must be mounted anew")
        descriptors.detach(self._run_dir)
        self._held = descriptors.mount_fresh(self._run_dir)
        self._fresh = True
        descriptors.drop_from_systemd()
        descriptors.store_in_systemd(self._held)

    def _dismiss(self, pid: int | None) -> None:
        """Let the stopped keeper go that the mount was taken from."""
        if pid in (None, os.getpid(), self._worker.pid) or not _holds_mount(self._run_dir, pid):
            return
        assert pid is not None
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, _HANDED_OVER)
            if not process.ended(pidfd, KILL_WAIT):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    # --- the worker -------------------------------------------------------------------------------

    def _adopt(self, recorded: int | None) -> None:
        """Watch a living worker that another keeper started, though it is no child of ours."""
        owner = slots.owner_of(self._held.slots)
        if owner is None or process.is_doomed(owner):
            # Perhaps one that has not come so far as to claim the slots, or the successor of one that hangs.
            living = recorded is not None and not process.is_doomed(recorded)
            owner = recorded if living and _holds_mount(self._run_dir, recorded) else None
        if owner is None or owner == self._owned.previous:
            return
        with suppress(OSError):
            self._worker.adopt(owner)
            self._watch(adopted=True)
            _log(f"adopted worker {owner}")
            self._worker_serves()

    def _start_worker(self) -> int | None:
        """Start a worker; an exit code when that is given up. What the node lacks now it may have again soon."""
        self._started, self._served = time.monotonic(), False
        try:
            self._worker.start(self._held)
        except OSError as error:
            return self._again(f"cannot start a worker: {error}", accident=False)
        self._watch(adopted=False)
        return None

    def _watch(self, *, adopted: bool) -> None:
        self._killed = False
        self._watchdog.watch(self._worker.pid, self._held.slots, adopted=adopted)

    def _worker_serves(self) -> None:
        self._served, self._fresh = True, False
        self._watchdog.serves()
        process.sd_notify(f"READY=1\nSTATUS=worker {self._worker.pid} serves {self._run_dir}")

    def _worker_died(self, *, hangs: bool) -> int | None:
        pid, status = self._worker.pid, self._worker.reap()
        code = os.waitstatus_to_exitcode(status) if status is not None else None
        if code == descriptors.EXIT_GONE:
            _log("the mount was unmounted or aborted by somebody else: mounting anew")
            os.close(self._held.fuse)
            os.close(self._held.slots)
            self._mount()
            return None
        if code == descriptors.EXIT_BUSY:
            self._adopt(None)
            if self._worker.fd >= 0:
                return None
        if code != 0:  # else somebody asked it to end, to have it replaced
            slots.count(self._held.slots, "ended")
        self._watchdog.ended(code, silent=self._killed)
        how = "" if code is None else f" by signal {-code}" if code < 0 else f" with exit code {code}"
        what = f"worker {pid} was killed and hangs in the kernel" if hangs else f"worker {pid} ended{how}"
        return self._again(what, accident=self._served and code in (None, -signal.SIGKILL))

    def _again(self, what: str, *, accident: bool) -> int | None:
        """Arrange for another worker, later and later when they die young; an exit code when that is hopeless."""
        young = not accident and time.monotonic() - self._started < _GOOD_LIFE
        self._failures = self._failures + 1 if young else 0
        if self._fresh and self._failures >= _HOPELESS:
            _log(f"{_HOPELESS} workers ended before they served anything: giving up; see their messages above")
            descriptors.detach(self._run_dir)
            self._goodbye()
            return 1
        delay = min(_BACKOFF_LAST, _BACKOFF_FIRST * 2 ** (self._failures - 1)) if self._failures else 0.0
        self._next_start = time.monotonic() + delay
        _log(f"{what}: starting another in {delay:.1f} s")
        return None


def main(arguments: list[str]) -> int:
    """The keeper's own command line; see the module's docstring."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    options, worker_argv = arguments[:position], arguments[position + 1 :]
    if len(options) < 2 or options[0] != "--run-dir" or not worker_argv or options[2:] not in ([], ["--force"]):
        _log("usage: python -m floe.fuse.keeper --run-dir DIR [--force] -- WORKER [ARGUMENTS]")
        return 2
    return run_keeper(Path(options[1]), worker_argv, force="--force" in options[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
