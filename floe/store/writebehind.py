"""Frames on hand on their way to the cache: by few threads, in the order in which they came, whatever the disk does.

Part of a fetcher, in its event loop, except `_write`. What waits here keeps no memory: a frame that is given up is passed
over when its turn comes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from floe.store.cache import Writer
from floe.store.frames import VerifiedFrame
from floe.store.onhand import Held

_log = logging.getLogger(__name__)
_THREADS = 2


class WriteBehind:
    """Frames for the cache of `writer`. `tell` runs something in the loop, from another thread.

    `written` is told the frames of a request when they were written or passed over, and which of them the cache could not keep.
    """

    def __init__(
        self,
        writer: Writer,
        tell: Callable[..., None],
        written: Callable[[list[Held], list[tuple[Held, VerifiedFrame]]], None],
    ) -> None:
        self._writer = writer
        self._tell = tell
        self._on_written = written
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="floe-write")
        self._idle = _THREADS
        self._waiting: deque[list[Held]] = deque()

    def add(self, batch: list[Held]) -> None:
        """Write these frames of one request, when those before them are."""
        self._waiting.append(batch)
        self._next()

    def close(self) -> None:
        """Begin nothing more, and wait for what is being written."""
        self._waiting.clear()
        self._threads.shutdown(cancel_futures=True)

    def _next(self) -> None:
        while self._idle and self._waiting:
            batch = self._waiting.popleft()
            self._threads.submit(self._write, batch)
            self._idle -= 1

    def _write(self, batch: list[Held]) -> None:
        lost: list[tuple[Held, VerifiedFrame]] = []
        try:
            for run in _runs(batch):
                get, first = run[0][0].get, run[0][0].number
                frames = [frame for _, frame in run]
                # A stream's are read from memory; into others the next faults fall, which the page cache answers.
                if not self._writer.put_run(get.pack_id, first, frames, direct=get.streamed, unread=get.unread):
                    lost += run
        except Exception:
            _log.exception("frames of pack %s could not be written to the cache", batch[0].get.pack_id)
        self._tell(self._written, batch, lost)

    def _written(self, batch: list[Held], lost: list[tuple[Held, VerifiedFrame]]) -> None:
        self._idle += 1
        self._on_written(batch, lost)
        self._next()


def _runs(batch: list[Held]) -> Iterator[list[tuple[Held, VerifiedFrame]]]:
    """Adjacent frames together, of those that are still on hand."""
    run: list[tuple[Held, VerifiedFrame]] = []
    for held in batch:
        frame = held.frame  # once: the loop may take it away
        if run and (frame is None or held.number != run[-1][0].number + 1):
            yield run
            run = []
        if frame is not None:
            run.append((held, frame))
    if run:
        yield run
