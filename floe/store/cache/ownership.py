"""One writer per cache: a lock that ends with its process, or is taken from one that will never run again.

A writer that was killed may hang in the kernel, in the middle of one last change that still comes about some day: a hole
punched into frames that its successor has stored again by then would be zeros that a bit vouches for. So whatever such a
writer could change is left to it: each pack that is not complete gets a new folder, without frames, and the old
one is removed when that writer is gone. A complete pack it can only make incomplete, which is noticed: that comes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

from floe.store import process
from floe.store.cache.durable import write_durably
from floe.store.cache.node_cache import NodeCache, disk_errors
from floe.store.errors import BusyError, DamagedError
from floe.store.ids import is_hexdigest

_log = logging.getLogger(__name__)
_POLL = 0.02  # seconds between two tries
_DYING = 3.0  # seconds that a killed writer gets to be gone; what it left of packs is lost after that
_LEFT = ".left-"  # in the name of a folder left to a writer: <pack id>.left-<pid>
_held: dict[int, os.stat_result] = {}  # the locks that this process holds: descriptor to file


def _leave_to_parent() -> None:
    """A forked child has the parent's locks open, too: they would outlive the parent, and nobody could own its caches."""
    for fd, file in _held.items():
        with contextlib.suppress(OSError):  # closed without `release`: its number may be another file's, too
            if os.path.samestat(os.fstat(fd), file):
                os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class Owned(NamedTuple):
    """`fd` holds the lock for as long as it is open: until `release`. `hanging` is the process to call `leave_packs` for, or None."""

    fd: int
    hanging: int | None


def own(path: Path, wait: float) -> Owned:
    """Hold the lock file `path`; BusyError after `wait` seconds.

    It holds the owner's process id; a second number is a writer that hung and whose packs were not left to it yet. The
    lock file of a holder that was killed but hangs in the kernel is left to it, and a new one made.
    """
    until = time.monotonic() + wait
    hanging: int | None = None
    hanging_since = 0.0
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, _ = _pids(fd)
            current = _is_at(fd, path)
            os.close(fd)
            now = time.monotonic()
            if not holder or not process.is_doomed(holder):
                hanging = None
                if current and now >= until:
                    raise BusyError(
                        f"another process (pid {holder or 'unknown'}) writes to the cache {path.parent}",
                        hint="stop it, or use another cache directory",
                    ) from None
            elif hanging != holder:
                hanging, hanging_since = holder, now
            elif current and now - hanging_since >= _DYING:
                _replace(path, holder)
            time.sleep(_POLL)
            continue
        if _is_at(fd, path):
            _, left = _pids(fd)
            hung = left if left and process.is_doomed(left) else None
            _write(fd, f"{os.getpid()} {hung}" if hung else f"{os.getpid()}")
            _held[fd] = os.fstat(fd)
            return Owned(fd, hung)
        os.close(fd)  # the file was replaced while we waited for it


def release(fd: int) -> None:
    """Let the next owner in."""
    _held.pop(fd, None)
    os.close(fd)


def _replace(path: Path, holder: int) -> None:
    """Put a new lock file in the place of one that `holder` keeps locked, unless another process is at it or did."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            current, _ = _pids(fd)
        finally:
            os.close(fd)
        if current == holder:
            write_durably(path, f"0 {holder}".encode(), path.parent)
    except BlockingIOError:
        pass
    finally:
        os.close(folder)


def _pids(fd: int) -> tuple[int, int]:
    """The two numbers in a lock file, 0 for one that is not there."""
    found = [int(word) if word.isdigit() else 0 for word in os.pread(fd, 64, 0).decode("ascii", "replace").split()]
    holder, hung, *_ = [*found, 0, 0]
    return holder, hung


def _write(fd: int, text: str) -> None:
    os.pwrite(fd, text.encode(), 0)
    os.ftruncate(fd, len(text))


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def leave_packs(cache: NodeCache, lock: Owned) -> None:
    """Leave every pack that is not complete to the writer that hangs, if any, before anything of them is loaded.

    No file in the old ones is touched: that could wait for the process that hangs.
    """
    if lock.hanging is None:
        return
    given_up = 0
    for name in os.listdir(cache.packs):  # noqa: PTH208 - names only
        folder = cache.packs / name
        if not is_hexdigest(name) or not (folder / "bitmap").exists() or (folder / "complete").exists():
            continue
        with disk_errors(f"pack {name} in {cache.root}"):
            try:
                index = (folder / "index").read_bytes()
            except FileNotFoundError:
                index = b""
            pins = cache.pins(name)
            folder.rename(folder.with_name(f"{name}{_LEFT}{lock.hanging}"))
        with contextlib.suppress(DamagedError):  # an index that is not there or damaged is fetched again
            cache.add_index(name, index)
            for owner in pins:
                cache.pin(name, owner)
        given_up += 1
    _write(lock.fd, f"{os.getpid()}")
    _log.warning(
        "the cache's last writer, process %d, was killed and hangs in the kernel: %d packs start anew",
        lock.hanging,
        given_up,
    )


def remove_left(cache: NodeCache) -> None:
    """Remove the folders left to writers that hung, each once its writer is gone: now, or in a thread of its own."""
    left: dict[int, list[Path]] = {}
    for name in os.listdir(cache.packs):  # noqa: PTH208 - names only
        _, found, text = name.partition(_LEFT)
        if found and text.isdigit():
            left.setdefault(int(text), []).append(cache.packs / name)
    for pid, folders in left.items():
        threading.Thread(target=_remove_after, args=(pid, folders), name="floe-cache-left", daemon=True).start()


def _remove_after(pid: int, folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # it is gone
        pidfd = os.pidfd_open(pid)
        try:
            # A process that lives has the number of one that is gone.
            while process.is_doomed(pid) and not process.ended(pidfd, 60):
                pass
        finally:
            os.close(pidfd)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
