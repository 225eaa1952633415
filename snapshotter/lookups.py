"""A few threads that ask the store, so that the server's threads need not wait longer than they want."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from floe.store.errors import UnavailableError
from floe.store.threads import try_start

T = TypeVar("T")


class LookUps:
    """Runs calls in at most `most` daemon threads, in the order they came. Thread-safe.

    Daemons: one that hangs in the store must not keep the process from ending.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done; cancelling the future of one that has not begun takes it out of the queue."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, work))
            if self._threads == self._most:
                return future
            self._threads += 1
        if try_start("look-up", self._run) is None:
            self._without_thread(future, work)
        return future

    def _without_thread(self, future: Future[Any], work: Callable[[], Any]) -> None:
        """The threads that are there will do it; where there are none, it fails, and the next call tries to start one."""
        with self._lock:
            self._threads -= 1
            if self._threads:
                return
            with suppress(ValueError):
                self._waiting.remove((future, work))
        future.set_exception(UnavailableError("no thread can be started to ask the store"))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, work = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
