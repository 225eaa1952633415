"""One collector at a time: who removes something says so first, in `gc/removal`, and goes on only while it is still the one.

A collector that was killed leaves its record; the next one takes it over when nothing has been written to it for `LEASE`, by the
store's clock. One that only stood still finds its record replaced and stops. Between its last look and the end of a
deletion lies one request, which has a deadline far below that.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress

from floe.store import layout
from floe.store.errors import (
    AccessDeniedError,
    BusyError,
    ConflictError,
    DamagedError,
    FloeError,
    NotFoundError,
    UnsupportedError,
)
from floe.store.objects.base import ObjectStore
from floe.store.objects.permissions import DELETE, permissions
from floe.store.protection import Removal, read_removal

LEASE = 900.0  # seconds
LONGEST = 300.0  # seconds that a deletion may be tried: well below what is left of a lease after the last look


class Turn:
    """The right to remove objects of `store`, between `take` and `release`. Thread-safe."""

    def __init__(self, store: ObjectStore, *, lease: float = LEASE) -> None:
        self._store = store
        self._lease = lease
        self._owner, self._host = str(uuid.uuid4()), socket.gethostname()
        self._lock = threading.Lock()  # guards the rest; held while the record is written
        self._keys: tuple[str, ...] = ()
        self._number = 0
        self._version: str | None = None
        self._said = 0.0  # CLOCK_BOOTTIME of the last write; sleep counts

    def take(self) -> float:
        """Begin; returns the time by the store's clock.

        AccessDeniedError, before anything changes: objects may not be deleted. BusyError: another one is at it.
        UnsupportedError: the server ignores conditions, so that two would not notice each other.
        """
        self._check_permission()
        try:
            self._write()
        except ConflictError:
            self._take_over()
        try:
            other = Removal(self._owner, self._host, self._number + 1, ())
            self._store.put_if(layout.REMOVAL_KEY, other.encode(), None)
        except ConflictError:
            return self._store.head(layout.REMOVAL_KEY).modified
        self._store.delete(layout.REMOVAL_KEY)
        raise UnsupportedError(
            f"{self._store.url} ignores conditional puts, so nothing can be removed safely",
            hint="use a server that honours them; `floe store check` says which does",
        )

    def say(self, keys: Iterable[str]) -> None:
        """From now on `keys`, and nothing else, may be deleted; ConflictError when another collector took over."""
        with self._lock:
            self._keys = tuple(keys)
            self._write_or_stop()

    def check(self) -> None:
        """To be called before each deletion: ConflictError when another collector took over."""
        with self._lock:
            if time.clock_gettime(time.CLOCK_BOOTTIME) - self._said > self._lease / 3:
                self._write_or_stop()

    def release(self) -> None:
        """Done, or given up, or never begun; a failure leaves the record to the next collector."""
        if self._version is None:
            return
        with self._lock, suppress(FloeError):
            self._keys = ()
            self._write()  # if another took over, this is where it is noticed
            self._store.delete(layout.REMOVAL_KEY)

    def _check_permission(self) -> None:
        try:
            self._store.delete(f"checks/{self._owner}")  # nothing is there
        except AccessDeniedError as error:
            named = " and ".join(permissions(self._store.url, DELETE)) or "write access"
            raise AccessDeniedError(
                f"nothing was removed from {self._store.url}: {error}", hint=f"whoever removes needs {named}"
            ) from error

    def _record(self) -> Removal:
        return Removal(self._owner, self._host, self._number, self._keys)

    def _write(self) -> None:
        self._number += 1
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._version = self._store.put_if(layout.REMOVAL_KEY, self._record().encode(), self._version)
        self._said = began

    def _write_or_stop(self) -> None:
        try:
            self._write()
        except ConflictError as error:
            raise ConflictError(
                "another floe gc has taken over from this one, which stood still", hint="nothing is lost"
            ) from error

    def _take_over(self) -> None:
        """Replace a record that nobody has touched for the lease."""
        clock = f"checks/{self._owner}"
        self._store.put(clock, b"")
        now = self._store.head(clock).modified
        self._store.delete(clock)
        try:
            found = self._store.head(layout.REMOVAL_KEY)
            host = getattr(read_removal(self._store), "host", "another machine")
        except NotFoundError as error:
            raise BusyError("another floe gc has just ended", hint="try again") from error
        except DamagedError:
            host = "another machine"
        left = self._lease - (now - found.modified)
        if left > 0:
            raise BusyError(
                f"another floe gc is at work on {host}",
                hint=f"wait for it; if it was killed, this one can go on with it in {max(1, round(left / 60))} min",
            )
        self._version = found.version
        try:
            self._write()
        except ConflictError as error:
            raise BusyError("another floe gc was faster", hint="wait for it") from error
