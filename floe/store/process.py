"""What a daemon does to its own process: survive a shortage of memory, own a directory, talk to systemd.

Imports little on purpose: the keeper of the pack filesystem lives in some 12 MiB.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from floe.store import mounttable
from floe.store.errors import BusyError, PreconditionError

if TYPE_CHECKING:
    import socket  # at run time it is the callers' who need it: the keeper does not

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # asm-generic/mman.h
_CAP_IPC_LOCK = 14
_SIGKILL_BIT = 1 << 8  # in the masks of /proc/<pid>/status
_OOM_SCORE_ADJ = -999  # -1000 would exempt the children too, containers' shims included
LISTEN_FDS_START = 3  # sd_listen_fds(3)
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # says nothing about what was to be opened
_REST = 1.0  # seconds in which nobody is accepted after that


def log(name: str, message: str) -> None:
    """One line to stderr, if it can be had there: for processes too small for `logging`."""
    with suppress(OSError):  # a full disk or a reader that went away must not end the process
        sys.stderr.write(f"{name}[{os.getpid()}]: {message}\n")
        sys.stderr.flush()


def harden() -> list[str]:
    """Lock memory and ask to be the last one killed; returns what could not be done, for the log.

    A reader waits for this process, so it must not in turn wait for memory that only readers could free.
    Pages are locked as they are touched (MCL_ONFAULT): locking all at once would fill sparse mappings.
    """
    problems = []
    flags = _MCL_CURRENT | _MCL_ONFAULT
    if _has_capability(_CAP_IPC_LOCK):
        flags |= _MCL_FUTURE  # without the capability RLIMIT_MEMLOCK would make later allocations fail
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(flags):
        problems.append(f"memory is not locked: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), encoding="ascii")
    except OSError as error:
        problems.append(f"oom_score_adj stays as it is: {error.strerror}")
    return problems


def allow_open_files() -> None:
    """Raise the limit of open files to what this process may have: a shell's usual 1024 is soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # beyond what the kernel allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _has_capability(number: int) -> bool:
    with Path("/proc/self/status").open(encoding="ascii") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def is_doomed(pid: int) -> bool:
    """Whether a process only waits for the kernel to let it end: it was killed, or its first thread ended.

    A thread that hangs in the kernel keeps such a process, its descriptors and its locks for as long as it hangs, but
    no code of the process's own runs again. False for a process that there is no more.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    fields = dict(line.partition(":")[::2] for line in text.split("\n"))
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    return fields.get("State", "").strip()[:1] in ("Z", "X") or bool(pending & _SIGKILL_BIT)


def hangs_doomed(pid: int) -> bool:
    """Whether a doomed process has a thread left, and so its descriptors; a zombie that nobody waited for has neither."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False
    return is_doomed(pid) and any(_state(thread / "stat") not in ("Z", "X", "") for thread in threads)


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP and its like) keeps a process from running; not a debugger, who knows what they do."""
    return _state(Path(f"/proc/{pid}/stat")) == "T"


def is_busy(pid: int) -> bool:
    """Whether any thread of a process runs or wants to, waits in the kernel for a disk or for memory, or is debugged."""
    try:
        return any(_state(thread / "stat") in ("R", "D", "t") for thread in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def _state(path: Path) -> str:
    """The letter that proc(5) has for the state of a task; empty when it is gone."""
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].strip()[:1]


def machine_ends() -> bool:
    """Whether this machine goes down and all units are stopped: PID 1 is `systemd-shutdown` then.

    It sends everybody SIGTERM and waits until all have ended, 90 seconds as a rule, before it kills them.
    """
    try:
        return Path("/proc/1/comm").read_text("utf-8", "replace").strip() == "systemd-shutdow"  # 15 bytes of the name
    except OSError:
        return False


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory, in any memory cgroup; 0 when it does not tell."""
    try:
        with Path("/proc/vmstat").open(encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


def ended(pidfd: int, wait: float) -> bool:
    """Whether the process of this pidfd has ended, within `wait` seconds."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(wait * 1000))


def refuse_own_mount(run_dir: Path) -> None:
    """PreconditionError when a file this process has mapped lies on a Floe tree below `run_dir`.

    Such a process would wait for itself. Binds of a tree and overlays above one count too.
    """
    ours = _tree_devices(os.path.realpath(run_dir), mounttable.mounts())
    if not ours:
        return
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) < 6:
                continue
            major, _, minor = fields[3].partition(":")
            if (int(major, 16), int(minor, 16)) in ours:
                raise PreconditionError(
                    f"this process runs from a Floe mount: {fields[5].strip()} is mapped from one",
                    hint="install Floe on the node's own disk and start it from there",
                )


def _tree_devices(run_dir: str, mounts: list[mounttable.Mount]) -> set[tuple[int, int]]:
    inside = run_dir.rstrip("/") + "/"
    ours = {m.device for m in mounts if m.fstype in mounttable.TREE_TYPES and m.target.startswith(inside)}
    for overlay in mounts:
        if ours and overlay.fstype == "overlay" and any(_lies_on(d, ours, mounts) for d in _lower_dirs(overlay)):
            ours.add(overlay.device)
    return ours


def _lower_dirs(overlay: mounttable.Mount) -> list[str]:
    for option in overlay.options.split(","):
        if option.startswith("lowerdir="):
            return mounttable.unescape(option[len("lowerdir=") :]).split(":")
    return []


def _lies_on(path: str, devices: set[tuple[int, int]], mounts: list[mounttable.Mount]) -> bool:
    best = max(
        (m for m in mounts if path == m.target or path.startswith(m.target.rstrip("/") + "/")),
        key=lambda m: len(m.target),
        default=None,
    )
    return best is not None and best.device in devices


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names one process. None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def identity(pid: int) -> str | None:
    """`PID.START`: names one process of this boot, whoever gets its pid later. None when it is gone."""
    started = start_time(pid)
    return None if started is None else f"{pid}.{started}"


def is_alive(name: str) -> bool:
    """Whether the process that `identity` named lives."""
    pid = name.partition(".")[0]
    return pid.isdigit() and identity(int(pid)) == name


class OwnedDirectory:
    """A claim on a directory under one name, held by a lock on `<name>.pid` until `release` or death.

    `previous` is the process id that the file named before, or None: perhaps a process that ended badly.
    """

    def __init__(self, path: Path, fd: int, previous: int | None) -> None:
        self.path = path
        self.previous = previous
        self._fd = fd

    def release(self, *, remove: bool = True) -> None:
        """Give the claim up; `remove=False` leaves the file to say who was here."""
        if self._fd < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def hand_back(self) -> None:
        """Give the claim up, as if it had never been made: the file names the previous process again."""
        os.ftruncate(self._fd, 0)
        if self.previous is not None:
            os.pwrite(self._fd, f"{self.previous}\n".encode(), 0)
        self.release(remove=False)

    def __enter__(self) -> OwnedDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def own_directory(run_dir: Path, name: str, *, wait: float = 0.0) -> OwnedDirectory:
    """Claim `run_dir` (made when missing) for this process as `name`, writing `<run_dir>/<name>.pid`.

    Raises BusyError naming the process that holds it, after trying for `wait` seconds.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    path = Path(run_dir) / f"{name}.pid"
    deadline = time.monotonic() + wait
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_pid(fd)
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"{os.fspath(run_dir)} belongs to a running {name}, process {holder}",
                    hint="stop it first, or give this one another run directory",
                ) from error
            time.sleep(0.02)
            continue
        if _same_file(fd, path):
            break
        os.close(fd)  # the former owner removed it between our open and our lock
    previous = _read_pid(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return OwnedDirectory(path, fd, previous)


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def sd_notify(state: str, fds: Sequence[int] = ()) -> bool:
    """Send `state` to systemd the documented way; `fds` go along (FDSTORE=1). False when nobody listens.

    Source: sd_notify(3). Problems in sending are not the daemon's: they are swallowed, as libsystemd's callers do.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    import socket  # noqa: PLC0415 - only under systemd, and not small

    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], list(fds))
    except OSError:
        return False
    return True


class Heartbeat:
    """What a service with WatchdogSec= tells systemd, for as long as it gets on; it is ended and started again otherwise.

    `pause`: seconds between two beats; None when nobody listens. The variables are removed, so that children do not take
    them for theirs. Source: sd_watchdog_enabled(3).
    """

    def __init__(self) -> None:
        microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        meant = microseconds.isdigit() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
        self.pause = int(microseconds) / 2e6 if meant else None
        self._next = 0.0

    def beat(self) -> None:
        """Say so, unless it was just said."""
        now = time.monotonic()
        if self.pause is not None and now >= self._next:
            sd_notify("WATCHDOG=1")
            self._next = now + self.pause / 2


def listen_fds() -> dict[str, int]:
    """The descriptors systemd passed (from its store or for sockets), by name; closed on exec from now on.

    Source: sd_listen_fds_with_names(3). The variables are removed, so that children do not take them for theirs.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found = {}
    for position in range(int(count)):
        fd = LISTEN_FDS_START + position
        os.set_inheritable(fd, False)
        found[names[position] if position < len(names) else "unknown"] = fd
    return found


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection; None when the listener is closed. While there are no descriptors to spare nobody is taken."""
    while True:
        try:
            return listener.accept()[0]
        except OSError as error:
            if error.errno not in NO_DESCRIPTORS:
                return None
            time.sleep(_REST)
