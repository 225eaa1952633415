"""Who waits for what: locks by key with a deadline, and gates that let only so many in."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from floe.store.errors import BusyError, DeadlineError

K = TypeVar("K", bound=Hashable)


class Turns(Generic[K]):
    """A lock for each key, which lives as long as somebody wants it. Thread-safe. `what` is for messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._wanted: dict[K, tuple[threading.Lock, int]] = {}

    @contextmanager
    def take(self, key: K, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock of `key`; DeadlineError after waiting for `timeout` seconds (None: as long as it takes)."""
        with self._lock:
            lock, users = self._wanted.get(key, (threading.Lock(), 0))
            self._wanted[key] = (lock, users + 1)
        try:
            if not lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
                raise DeadlineError(f"{self._what} {key} is being worked on by another request", hint="try again")
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._wanted[key]
                if users == 1:
                    del self._wanted[key]
                else:
                    self._wanted[key] = (lock, users - 1)


class Gate:
    """Lets so many in at once and turns others away. Thread-safe. `what` is for messages."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._places = threading.BoundedSemaphore(most)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside; BusyError, at once, when it is full."""
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{self._most} requests wait for {self._what} already", hint="try again")
        try:
            yield
        finally:
            self._places.release()
