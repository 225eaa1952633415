"""Leftovers of test sessions that were killed: their processes ended, their mounts, networks and folders taken away.

A session marks what it starts. Its processes inherit the environment variable `MARK`, which holds the pid of pytest and
when that was started; its folders carry the pid in their names, or lie in pytest's own numbered folder, which holds it in
`.lock`; its network links bear the mark as their alias, its network namespaces in their names. What belongs to a session
that still runs, or to nobody's tests, is never touched.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from floe.store import mounttable

MARK = "TEST_SESSION_OF_FLOE"
NETNS = "floe-test-"  # a network namespace's name: this, the mark, a dot and what tells it from others
_PLACES = (Path("/run"), Path("/var/tmp"))
_FOLDER = re.compile(r"floe-test-[a-z]+-(\d+)-.*")
_stops: list[Callable[[], None]] = []
_PATIENCE = 5.0  # seconds that killed processes get to be gone


def folder(kind: str, place: Path) -> Path:
    """A new folder of this session in `place`, one of those that a sweep looks through."""
    assert place in _PLACES
    return Path(tempfile.mkdtemp(prefix=f"floe-test-{kind}-{os.getpid()}-", dir=place))


def begin() -> list[str]:
    """Mark what this process starts from now on, and sweep what dead sessions left; what was found, in words."""
    os.environ[MARK] = f"{os.getpid()}.{_started(os.getpid())}"
    return _sweep(_dead_folders(), lambda mark: not _alive(mark))


def at_end(stop: Callable[[], None]) -> None:
    """Have `stop` called once the tests are over: by `end`, or when the process ends."""
    _stops.append(stop)
    if len(_stops) == 1:
        atexit.register(_stop_all)


def end() -> list[str]:
    """Stop what all tests shared, then sweep what they left, except their folders; what was found, in words."""
    _stop_all()
    own = os.environ[MARK]
    return _sweep([], lambda mark: mark == own)


def clear() -> None:
    """At once, in whatever state it is: end what this session started, and take away its folders and their mounts."""
    own = os.environ[MARK]
    folders = [path for place in _PLACES for path in place.glob(f"floe-test-*-{os.getpid()}-*")]
    while any(not found.startswith("folder") for found in _sweep(folders, lambda mark: mark == own)):
        pass  # a thread that still ran may have begun something


def _stop_all():
    while _stops:
        _stops.pop()()


def _sweep(folders, is_dead):
    found = []
    doomed = _processes(is_dead)
    for pid, name in doomed.items():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            found.append(f"process {pid}, {name}")
    until = time.monotonic() + _PATIENCE
    while any(_started(pid) for pid in doomed) and time.monotonic() < until:
        time.sleep(0.02)
    ended = _ended_folders()
    for mount in reversed(mounttable.mounts()):
        if any(Path(mount.target).is_relative_to(place) for place in (*folders, *ended)):
            # Lazily: whoever served it is dead, and the next line must not depend on that.
            subprocess.run(["umount", "--lazy", "--no-canonicalize", mount.target], check=False, timeout=20)
            found.append(f"mount {mount.target}")
    found += _sweep_networks(is_dead)
    for place in folders:
        # Not shutil.rmtree: before Python 3.13 it fails over deep directories, and pytest with it.
        subprocess.run(["rm", "-rf", "--one-file-system", place], check=False)
        found.append(f"folder {place}")
    return found


def _sweep_networks(is_dead):
    doomed = []
    for file in Path("/sys/class/net").glob("*/ifalias"):
        with contextlib.suppress(OSError):  # went meanwhile
            key, _, mark = file.read_text().strip().partition("=")
            if key == MARK and is_dead(mark):
                doomed.append(("link", file.parent.name))
    named = [file.name for file in Path("/run/netns").glob(f"{NETNS}*")]
    doomed += [("netns", name) for name in named if is_dead(".".join(name.removeprefix(NETNS).split(".")[:2]))]
    words = [["ip", kind, "del", name] for kind, name in doomed]
    gone = [each for each in words if subprocess.run(each, check=False, capture_output=True).returncode == 0]
    return [f"{kind} {name}" for _, kind, _, name in gone]


def _processes(is_dead):
    """By pid: those with a dead session's mark, and all their descendants."""
    parents, doomed = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            words = [os.fsdecode(word) for word in (entry / "cmdline").read_bytes().split(b"\0") if word]
            variables = (entry / "environ").read_bytes().split(b"\0")
            parents[pid] = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        mark = next((v.decode().partition("=")[2] for v in variables if v.startswith(MARK.encode() + b"=")), None)
        ours = pid == os.getpid() or any("multiprocessing.resource_tracker" in word for word in words)  # ends with us
        if not ours and mark is not None and is_dead(mark):
            doomed[pid] = " ".join(words)[:120]
    while more := {
        pid: "a child of those" for pid, parent in parents.items() if parent in doomed and pid not in doomed
    }:
        doomed |= more
    return doomed


def _dead_folders():
    dead = [
        path
        for place in _PLACES
        for path in place.glob("floe-test-*")
        if (name := _FOLDER.fullmatch(path.name)) and _started(int(name[1])) is None
    ]
    return dead + [path for path, pid in _pytest_folders() if pid is not None and _started(pid) is None]


def _ended_folders():
    """What pytest keeps, or was about to remove, of sessions that ended by themselves: a test that was broken off may have left mounts."""
    return [path for path, pid in _pytest_folders() if pid is None]


def _pytest_folders():
    """Pytest's folders for sessions, and the pid of whose session still has it or was killed; None where it ended by itself."""
    for path in Path(tempfile.gettempdir()).glob(f"pytest-of-{getpass.getuser()}/*"):
        if path.is_symlink() or not path.is_dir() or not re.fullmatch(r"pytest-\d+|garbage-.*", path.name):
            continue
        try:
            yield path, int((path / ".lock").read_text())
        except (FileNotFoundError, ValueError):
            yield path, None


def _alive(mark):
    pid, _, started = mark.partition(".")
    return pid.isdigit() and started == str(_started(int(pid)))


def _started(pid):
    """When a process was started, in clock ticks since boot; None when it is gone, or waits for its parent only."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
