"""What an indexer exports: its own jobs, what it took from registries, and the queue that all indexers share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from floe.indexer.worker import Indexer
from floe.ingest.oci.taken import TAKEN, Taken
from floe.store.errors import FloeError
from floe.store.exposition import COUNTER, GAUGE, Metric, MetricsServer
from floe.store.histogram import Distribution
from floe.store.index.jobs import Queue, QueueStatus

Values: TypeAlias = "dict[tuple[str, ...], float | Distribution]"
_LOOK = 15.0  # seconds between two looks at the queue


class Looking:
    """The queue as of the last look; `found` is None while nobody answers. A thread of its own looks: no scrape waits for Redis."""

    def __init__(self, queue: Queue, every: float = _LOOK) -> None:
        self.found: QueueStatus | None = None
        self._queue, self._every = queue, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue-look", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.found = self._queue.status(1)
            except FloeError:
                self.found = None
            self._stop.wait(self._every)


@contextlib.contextmanager
def serving(address: str, worker: Indexer, queue: Queue) -> Iterator[str]:
    """Serve the metrics of `worker` at `address` meanwhile; where they are. Raises what MetricsServer does."""
    began = time.monotonic()
    with contextlib.closing(Looking(queue)) as looking:
        server = MetricsServer(
            address, lambda: indexer_metrics(worker.became, TAKEN, looking.found, time.monotonic() - began)
        )
        with contextlib.closing(server):
            yield server.address


def indexer_metrics(
    became: Mapping[str, int], taken: Taken, queue: QueueStatus | None, uptime: float
) -> Iterable[Metric]:
    """Of a queue that does not answer nothing is told."""
    yield Metric("floe_indexer_uptime_seconds", "Since the indexer started", GAUGE, (), {(): uptime})
    jobs: Values = {(name,): float(count) for name, count in became.items()}
    yield Metric("floe_indexer_jobs", "Jobs of this indexer by what became of them", COUNTER, ("outcome",), jobs)
    counted = taken.counted()
    for what, text in (("requests", "Answers of registries with content"), ("bytes", "Their bytes, as they came")):
        values: Values = {(content,): float(count) for content, count in counted[what].items()}
        yield Metric(f"floe_registry_{what}", text, COUNTER, ("content",), values)
    states = ("waiting", "working", "retrying", "failed")
    waiting: Values = {(state,): float(getattr(queue, state)) for state in states} if queue else {}
    yield Metric("floe_indexer_queue_jobs", "Jobs in the queue of all indexers", GAUGE, ("state",), waiting)
    lag: Values = {(): queue.lag} if queue else {}
    yield Metric("floe_indexer_queue_lag_seconds", "Since the oldest waiting job was asked for", GAUGE, (), lag)
