"""A job in hand: said to be worked on while it is, and stopped when it is somebody else's or the process is to end."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from floe.store.errors import CancelledError, UnavailableError
from floe.store.index.jobs import Lease, Queue, Task

_log = logging.getLogger(__name__)
_SOONER = 5  # times as often while the servers do not answer: the job is to be ours still when they are back


class Held:
    """Renews `task` every `every` seconds in a thread, and sooner after a failure; a context manager."""

    def __init__(self, queue: Queue, worker: str, task: Task, every: float) -> None:
        self._queue, self._worker, self._task, self._every = queue, worker, task, every
        self._ended = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._run, name="floe-job", daemon=True)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        pause = self._every
        while not self._ended.wait(pause):
            try:
                if not self._queue.renew(self._worker, self._task):
                    self.lost = True
                    return
            except UnavailableError as error:
                # The job is done all the same: whoever takes it over finds it done.
                if pause == self._every:  # said once
                    _log.warning("%s; the job goes on", error)
                pause = self._every / _SOONER
            else:
                pause = self._every


class Watch:
    """A Progress that stops the work: when the job is lost, its layers' lease is, or `stop` is set."""

    def __init__(self, held: Held, stop: threading.Event) -> None:
        self._held, self._stop = held, stop
        self.lease: Lease | None = None

    def total(self, nbytes: int) -> None:
        """See Progress.total."""

    def advance(self, nbytes: int) -> None:
        """See Progress.advance; CancelledError when the work is to stop."""
        del nbytes
        self.check()

    def check(self) -> None:
        """CancelledError when the work is to stop."""
        if self._stop.is_set():
            raise CancelledError("this indexer is being stopped")
        if self._held.lost:
            raise CancelledError("another indexer has this job by now")
        if self.lease is not None and self.lease.lost:
            raise CancelledError(
                "the lease of its layers could not be renewed in time: somebody else may store them by now"
            )
