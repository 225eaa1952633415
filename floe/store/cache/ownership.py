"""One writer per cache: a lock that ends with its process."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

from floe.store.errors import BusyError

_POLL = 0.02  # seconds between two tries


def own(path: Path, wait: float) -> int:
    """A descriptor that holds the lock file `path` for as long as it is open; BusyError after `wait` seconds.

    A holder that was killed but hangs in the kernel will never write again: its lock file is left to it, and a new
    one made.
    """
    until = time.monotonic() + wait
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            current = _is_at(fd, path)
            os.close(fd)
            if time.monotonic() >= until and current:
                if not _is_doomed(holder):
                    raise BusyError(
                        f"another process (pid {holder or 'unknown'}) writes to the cache {path.parent}",
                        hint="stop it, or use another cache directory",
                    ) from None
                path.unlink(missing_ok=True)
            time.sleep(_POLL)
            continue
        if _is_at(fd, path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd
        os.close(fd)  # the file was replaced while we waited for it


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _is_doomed(holder: str) -> bool:
    """Whether this process is only waiting for the kernel to let it die."""
    if not holder.isdigit():
        return False
    try:
        text = Path(f"/proc/{holder}/status").read_text()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    return fields.get("State", "").strip()[:1] in ("Z", "X") or bool(pending >> (signal.SIGKILL - 1) & 1)
