"""The worker of the pack filesystem: puts store, cache, reader and metrics together and serves."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack, closing

from floe.cli import node
from floe.cli.context import open_cache
from floe.cli.packfs_metrics import packfs_metrics
from floe.cli.settings import Settings
from floe.fuse import worker
from floe.fuse.pack_reader import PackReader
from floe.fuse.startup import StartUp
from floe.protos.packfs_control import PackfsClient
from floe.store import process
from floe.store.cache import CacheWriter
from floe.store.catalog import Catalog
from floe.store.errors import FloeError
from floe.store.exposition import Metric, MetricsServer
from floe.store.index import NullIndex
from floe.store.objects import open_store
from floe.store.objects.retry import RetryingStore
from floe.store.profiles import ProfileStore
from floe.store.recorder import Recorder

_log = logging.getLogger(__name__)
_PREDECESSOR = 10.0  # seconds that a worker which is ending may keep the cache


def run_worker(settings: Settings) -> int:
    """Serve until the keeper says stop; returns the process's exit code."""
    process.allow_open_files()
    with ExitStack() as stack:
        # Not one that retries: the reader does, for as long as anybody waits, and knows why reads wait.
        store = stack.enter_context(closing(open_store(settings.store, retry=False)))
        writer = stack.enter_context(closing(CacheWriter(open_cache(settings), wait=_PREDECESSOR)))
        recorder = Recorder()
        reader = PackReader(
            store,
            writer,
            readahead=settings.readahead,
            deadline=settings.read_deadline,
            budget=settings.fetch_memory,
            recorder=recorder,
        )
        stack.callback(reader.close)
        patient = RetryingStore(store, deadline=settings.store_timeout)
        startup = StartUp(ProfileStore(Catalog(patient, NullIndex())), writer, reader, recorder, mode=settings.profiles)
        stack.callback(startup.close)
        metrics = _serve_metrics(settings)
        if metrics is not None:
            stack.callback(metrics.close)
        return worker.run_worker(
            settings.run_dir, reader, busy_poll=settings.busy_poll == "on", mounted=startup.mounted
        )


def _serve_metrics(settings: Settings) -> MetricsServer | None:
    """Metrics, if they can be served: readers come first, and wait for this worker."""
    address = settings.metrics("packfs")
    if address is None:
        return None
    client = PackfsClient(settings.run_dir)  # the worker's own socket, which knows all its figures

    def collect() -> Iterable[Metric]:
        mounts = sum(1 for _ in node.tree_mounts(settings.run_dir))
        return packfs_metrics({**client.status(), "mounts": mounts})

    try:
        return MetricsServer(address, collect)
    except FloeError as error:
        _log.warning("no metrics: %s", error)
        return None
