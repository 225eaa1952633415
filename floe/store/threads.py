"""Threads that are begun when there is work: where a process can have no more of them just now, the work waits for the next try."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_log = logging.getLogger(__name__)


def try_start(name: str, run: Callable[..., object], *args: Any) -> threading.Thread | None:
    """A daemon thread that runs; None, and a warning, where none can be started: a limit of processes, or of memory, is reached."""
    thread = threading.Thread(target=run, args=args, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        _log.warning("the thread %s is begun later: %s", name, error)
        return None
    return thread


def started_pool(count: int, name: str) -> ThreadPoolExecutor:
    """A pool all of whose threads run already, so that handing it work cannot fail for want of one. RuntimeError."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    everybody = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(everybody.wait)
    except BaseException:
        everybody.abort()
        pool.shutdown(wait=False)
        raise
    everybody.wait()
    return pool
