"""The worker of the pack filesystem: puts store, cache, reader and metrics together and serves."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import floe
from floe.cli import node
from floe.cli.context import open_cache
from floe.cli.packfs_metrics import packfs_metrics
from floe.cli.settings import Settings
from floe.fuse import worker
from floe.fuse.damage import DamageReports
from floe.fuse.framemaps import FrameMaps
from floe.fuse.joined import Joined
from floe.fuse.pack_reader import PackReader
from floe.fuse.residency import Mounted, Residency
from floe.fuse.stalls import Stalls
from floe.fuse.starts import Starts
from floe.fuse.startup import StartUp
from floe.fuse.warming import Warming
from floe.protos.packfs_control import PackfsClient
from floe.store import process
from floe.store.cache import Writer, open_writer
from floe.store.catalog import Catalog
from floe.store.errors import FloeError
from floe.store.eventlog import EventLog
from floe.store.exposition import Metric, MetricsServer
from floe.store.ids import ModelRef
from floe.store.index import NullIndex
from floe.store.loglevel import Follower
from floe.store.objects import open_store
from floe.store.objects.retry import RetryingStore
from floe.store.profiles import ProfileStore
from floe.store.recorder import Recorder
from floe.store.spans import spans_to

_log = logging.getLogger(__name__)
_PINS_FOR = 15.0
_PREDECESSOR = 10.0  # seconds that a worker which is ending may keep the cache


def run_worker(settings: Settings) -> int:
    """Serve until the keeper says stop; returns the process's exit code."""
    process.allow_open_files()
    with ExitStack() as stack:
        stack.enter_context(closing(Follower(settings.run_dir)))
        # Not one that retries: the reader does, for as long as anybody waits, and knows why reads wait.
        store = stack.enter_context(closing(open_store(settings.store, retry=False)))
        cache = open_cache(settings, required=False)  # who reads a mounted tree needs no disk of ours
        writer = stack.enter_context(closing(open_writer(cache, wait=_PREDECESSOR, bypass=settings.cache_bypass)))
        recorder = Recorder()

        def packs_of(tree: str) -> tuple[str, ...]:
            return _packs_of(residency, tree)

        def trees_of(pack_id: str) -> list[str]:
            return [tree for tree, _ in _mounted(settings.run_dir) if pack_id in packs_of(tree)]

        spans = spans_to(settings.otlp_endpoint, "packfs", version=floe.__version__, packs_of=packs_of)
        if spans is not None:
            stack.callback(spans.close)
        events = stack.enter_context(closing(EventLog(settings.run_dir, "packfs", spans=spans)))

        stalls = Stalls(events, trees_of, writer.cache.tree_path)
        stack.callback(stalls.close)
        reader = PackReader(
            store,
            writer,
            readahead=settings.readahead,
            deadline=settings.read_deadline,
            budget=settings.fetch_memory,
            recorder=recorder,
            completion_rate=settings.completion_rate,
            stalled=stalls.add,
        )
        stack.callback(reader.close)
        patient = RetryingStore(store, deadline=settings.store_timeout)
        profiles = ProfileStore(Catalog(patient, NullIndex()))
        startup = StartUp(profiles, writer, reader, recorder, mode=settings.profiles, told=events.add)
        stack.callback(startup.close)

        def source_of(tree: str) -> str | None:
            return None if (profile := profiles.of_tree(tree)) is None else profile.source

        completing = Joined(reader, 2)
        warming = Warming(
            writer, completing.part(0), profile_of=startup.frames, damage=lambda: reader.known_damage.frames
        )
        stack.callback(warming.close)
        residency = Residency(
            writer,
            completing.part(1),
            mounted=lambda: _mounted(settings.run_dir),
            source_of=source_of,
            completion=settings.completion,
            policies=settings.model_policy.policies,
        )
        stack.callback(residency.close)
        residency.start()
        damage = DamageReports(
            reader.known_damage,
            patient,
            mounted=lambda: _mounted(settings.run_dir),
            packs_of=residency.packs_of,
            source_of=source_of,
        )
        stack.callback(damage.close)
        metrics = _serve_metrics(settings)
        if metrics is not None:
            stack.callback(metrics.close)

        starts = Starts(recorder, events, residency.packs_of, reader.counters, source_of)
        stack.callback(starts.close)
        pinned = Pinned(writer)
        maps = FrameMaps(writer, reader.touched, pinned.packs)
        events.add("worker", pid=os.getpid(), version=floe.__version__)

        def mounted(tree: str, packs: Sequence[str]) -> None:
            events.add("mounted", tree=tree, packs=len(packs))
            startup.mounted(tree, packs)
            residency.mounted(tree, packs)

        def status() -> dict[str, Any]:
            found = residency.status()
            damaged, disks = damage.status(), writer.disks()
            return {
                "residency": found,
                "completion": residency.states(found),
                "cache": disks,
                "cache_limit_bytes": cache.size or 0,
                "pinned_packs": len(pinned.packs()),
                "damaged": damaged,
                "waits": reader.waits(),
                "starts": starts.status(),
                "warm_orders": warming.count(),
                "stalls": stalls.status(),
            }

        return worker.run_worker(
            settings.run_dir,
            reader,
            busy_poll=settings.busy_poll == "on",
            patience=settings.read_deadline,
            mounted=mounted,
            expected=startup.expected,
            unexpected=startup.unexpected,
            started=starts.begun,
            warming=warming,
            frames=maps.answer,
            more_status=status,
        )


class Pinned:
    """Which packs of a cache are pinned, looked up no more often than every _PINS_FOR seconds: a look at the disk for each pack."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._until = 0.0
        self._packs: frozenset[str] = frozenset()

    def packs(self) -> frozenset[str]:
        """As of the last look."""
        if time.monotonic() >= self._until:
            with suppress(OSError):
                self._packs = frozenset(p for p in list(self._writer.packs) if self._writer.cache.pins(p))
            self._until = time.monotonic() + _PINS_FOR
        return self._packs


def _packs_of(residency: Residency, tree: str) -> tuple[str, ...]:
    try:
        return residency.packs_of(tree)
    except (FloeError, OSError):
        return ()


def _mounted(run_dir: Path) -> list[Mounted]:
    """The trees mounted here, the newest first, with the name (of all tags) of those mounted as models."""
    found = []
    for mount in node.tree_mounts(run_dir):
        if mount["mode"] != "store":
            names = [ModelRef.parse(text).name for text in mount["models"].values()]
            found.append(Mounted(mount["tree"], names[0] if names else None))
    return sorted(found, key=lambda mounted: _changed(run_dir / "mounts" / f"{mounted.tree}.json"), reverse=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it is just being unmounted
        return 0.0


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
