"""Putting objects into the store, with --write only. The scratch folder notes them first, and they are always removed."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from floe.selfbench.figures import Upload
from floe.selfbench.store import Source
from floe.store.objects.base import ObjectStore

FOLDER = "bench"
_OBJECTS = 4  # at once


def objects(size: int) -> tuple[Source, ...]:
    """New objects of `size` bytes in all, to be put."""
    run = uuid.uuid4().hex
    return tuple(Source(f"{FOLDER}/{run}-{number}", size // _OBJECTS) for number in range(_OBJECTS))


def measure(store: ObjectStore, put: Sequence[Source], note: Callable[[], None]) -> Upload:
    """Put all of `put` at once, with random content; `note` is called before. The store's errors.

    Who may not delete does not get to put.
    """
    store.delete(put[0].key)
    note()
    data = os.urandom(max(source.size for source in put))
    with ThreadPoolExecutor(len(put), thread_name_prefix="floe-bench-put") as threads:
        begun = time.perf_counter()
        for done in [threads.submit(store.put, source.key, data[: source.size]) for source in put]:
            done.result()
        seconds = time.perf_counter() - begun
    total = sum(source.size for source in put)
    return Upload(len(put), total, seconds, total / seconds)
