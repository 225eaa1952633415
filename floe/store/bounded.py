"""Work that is waited for only so long, whatever it hangs in: a name server, a dead host, a stuck disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Bounded:
    """Does work in threads called `name`, at most `places` at once. Thread-safe.

    Work that outlived its time keeps its place until it returns, so what hangs ties up so many threads and no more.
    """

    def __init__(self, name: str, places: int) -> None:
        self._name = name
        self._places = threading.BoundedSemaphore(places)

    def call(self, work: Callable[[], T], seconds: float, late: Exception) -> T:
        """What `work` returns or raises; `late` when it takes longer than `seconds`."""
        until = time.monotonic() + seconds
        if not self._places.acquire(timeout=seconds):
            raise late
        answers: SimpleQueue[T | BaseException] = SimpleQueue()

        def run() -> None:
            try:
                answers.put(work())
            except BaseException as error:
                answers.put(error)
            finally:
                self._places.release()

        # A daemon thread: one that hangs must not keep the process from ending.
        threading.Thread(target=run, name=self._name, daemon=True).start()
        try:
            answer = answers.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            raise late from None
        if isinstance(answer, BaseException):
            raise answer
        return answer
