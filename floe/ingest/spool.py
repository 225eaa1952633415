"""A private directory for packs on their way to the store; what a killed push left behind is cleared away.

Ingests that work side by side have a directory each, but share the room: no more than so many bytes lie in all of them together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from floe.ingest.packwriter import spool_failure
from floe.store.errors import CancelledError
from floe.store.packindex import MAX_CONTENT

SPOOL_BYTES = 3 * MAX_CONTENT  # a pack that grows, two that wait for upload
_PREFIX = "floe-spool-"
_SHARES = 8  # of the room; twice as many as ingests work side by side


class Room:
    """Bytes that all spools of one command may hold together. Thread-safe."""

    def __init__(self, total: int = SPOOL_BYTES) -> None:
        self._left = self._total = total
        self._changed = threading.Condition()

    @property
    def share(self) -> int:
        """An open pack of at least so many bytes is sealed early when there is no room, so that it can be uploaded.

        Smaller ones cannot fill the room together, so something is always on its way to the store.
        """
        return self._total // _SHARES

    def take(self, nbytes: int, stopped: Callable[[], bool], *, wait: bool) -> bool:
        """Reserve `nbytes`; False when there is no room and `wait` is not set. CancelledError once `stopped()`."""
        with self._changed:
            # What is larger than the whole room passes alone.
            while self._left < nbytes and self._left < self._total:
                if stopped():
                    raise CancelledError("the push was stopped; nothing was published")
                if not wait:
                    return False
                self._changed.wait()
            self._left -= nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """So many bytes are free again."""
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()

    def wake(self) -> None:
        """Whoever waits asks again whether it was stopped."""
        with self._changed:
            self._changed.notify_all()


class Spool:
    """`path` is a new directory below `parent`, gone when this is closed, and with it what it took of `room`.

    Its owner holds a lock on it as long as it lives, so a directory that can be locked belongs to nobody and is
    removed by the next push. The parent is locked only while that is decided.
    """

    def __init__(self, parent: Path, room: Room | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        self._room = room or Room()
        self._stopped = stopped
        self._held = 0
        self._counting = threading.Lock()  # guards _held: packs leave from another thread than they come from
        try:
            parent.mkdir(parents=True, exist_ok=True)
            guard = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)
                _sweep(parent)
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            finally:
                os.close(guard)
        except OSError as error:
            raise spool_failure(error, parent) from error

    @property
    def share(self) -> int:
        """See Room.share."""
        return self._room.share

    def take(self, nbytes: int, *, wait: bool) -> bool:
        """See Room.take."""
        taken = self._room.take(nbytes, self._stopped, wait=wait)
        if taken:
            self._count(nbytes)
        return taken

    def give_back(self, nbytes: int) -> None:
        """So many bytes have left the directory."""
        self._count(-nbytes)
        self._room.give_back(nbytes)

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._held += nbytes

    def close(self) -> None:
        """Remove the directory and what is in it. Nobody writes to it any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self.give_back(self._held)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def remove_abandoned(folder: Path) -> None:
    """Remove a directory unless its owner lives, who holds a lock on it. Where directories cannot be locked, nothing is removed."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(folder)
    except OSError:
        pass
    finally:
        os.close(lock)


def remove_tree(folder: Path) -> None:
    """Remove a directory as far as that is allowed, directories in it that may not be written included."""
    for place, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        remove_abandoned(left)
