"""`floe snapshotter` as a process: start, serve until told to stop, leave every mount as it is."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from typing import Any

from floe import __version__
from floe.snapshotter import breaker, service
from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.lazylayers import LazyLayers
from floe.snapshotter.schema import Snapshot
from floe.snapshotter.snapshotter import Snapshotter
from floe.snapshotter.statussocket import StatusSocket
from floe.snapshotter.storelayers import open_layers
from floe.store.errors import FloeError
from floe.store.eventlog import EventLog
from floe.store.exposition import COUNTER, GAUGE, HISTOGRAM, Metric, MetricsServer, distributions
from floe.store.index.measured import STATES
from floe.store.loglevel import Follower
from floe.store.process import Heartbeat, harden, own_directory, refuse_own_mount, sd_notify
from floe.store.spans import spans_to
from floe.store.stopsignal import stop_signal

log = logging.getLogger(__name__)

# Pauses between attempts to mount what could not be mounted at start, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0


def serve(config: SnapshotterConfig) -> int:
    """Run in the foreground until SIGTERM or SIGINT; 0 then.

    BusyError when another snapshotter owns the root or the run directory, PreconditionError when this process runs from
    a Floe mount, and whatever keeps the directories or the sockets from being used.
    """
    config.check()
    refuse_own_mount(config.run_dir)
    with own_directory(config.root, "snapshotter"), own_directory(config.run_dir, "snapshotter"):
        for problem in harden():
            log.warning("%s", problem)
        run(config, open_layers(config), stop_signal())
    return 0


def run(config: SnapshotterConfig, layers: LazyLayers, stop: threading.Event) -> None:
    """Serve with these layers until `stop` is set. Mounts come first: who can dial finds every tree in its place.

    Returns when no thread works on the root directory any more: another process may own it then.
    """
    with ExitStack() as stack:
        stack.enter_context(closing(Follower(config.run_dir)))
        spans = spans_to(config.otlp_endpoint, "snapshotter", version=__version__)
        if spans is not None:
            stack.callback(spans.close)
        events = stack.enter_context(closing(EventLog(config.run_dir, "snapshotter", spans=spans)))
        events.add("snapshotter", pid=os.getpid(), version=__version__)
        snapshotter = Snapshotter(config, layers, events.add)
        stack.callback(snapshotter.close)
        failed = snapshotter.start()
        if config.metrics_address is not None:
            stack.callback(MetricsServer(config.metrics_address, lambda: _exposition(snapshotter)).close)
        server = service.server(config.address, snapshotter)
        server.start()
        aside = threading.Thread(target=_in_background, args=(snapshotter, failed, stop), name="tidy", daemon=True)
        aside.start()
        stack.callback(aside.join)
        stack.callback(server.stop)
        stack.callback(stop.set)
        stack.callback(snapshotter.wind_down)
        stack.callback(StatusSocket(config.run_dir, snapshotter.metrics).close)
        log.info("serving snapshots at %s, root %s", config.address, config.root)
        sd_notify("READY=1")
        heartbeat = Heartbeat()
        while not stop.wait(heartbeat.pause):
            try:
                snapshotter.metrics()  # by which the database is asked: who hangs there beats no more
            except FloeError as error:  # an answer, too; containerd's requests are told so as well
                log.warning("the snapshotter's database cannot be read: %s", error)
            heartbeat.beat()
        sd_notify("STOPPING=1")
        log.info("stopping; mounts stay as they are")


def _in_background(snapshotter: Snapshotter, failed: list[Snapshot], stop: threading.Event) -> None:
    try:
        snapshotter.tidy()
    except Exception:
        log.exception("what the last run left cannot be cleaned up")
    pause = _FIRST_PAUSE
    while failed and not stop.wait(pause):
        try:
            failed = snapshotter.remount(failed)
        except Exception:
            log.exception("trees cannot be mounted again")
        pause = min(2 * pause, _LONGEST_PAUSE)


def _exposition(snapshotter: Snapshotter) -> Iterable[Metric]:
    figures = snapshotter.metrics()

    def by(label: str, name: str, text: str, kind: str, values: dict[str, int]) -> Metric:
        return Metric(f"floe_snapshotter_{name}", text, kind, (label,), {(key,): n for key, n in values.items()})

    yield by("kind", "snapshots", "Snapshots by kind; lazy ones are committed.", GAUGE, figures.snapshots)
    yield by("reason", "fallbacks", "Layers unpacked the ordinary way.", COUNTER, figures.fallbacks)
    yield by("event", "events", "Lazy layers served, refusals, cleanups put off.", COUNTER, figures.counters)
    states = {state: int(state == figures.breaker) for state in breaker.STATES}
    yield by("state", "breaker", "1 for the state of the circuit breaker.", GAUGE, states)
    yield Metric("floe_snapshotter_mounts", "Trees bound for snapshots.", GAUGE, (), {(): figures.mounts})
    yield Metric(
        "floe_snapshotter_remount_failures",
        "Trees that could not be mounted again at start.",
        COUNTER,
        (),
        {(): figures.remount_failures},
    )
    text = "Of these, trees that still are not mounted."
    yield Metric("floe_snapshotter_unmounted_trees", text, GAUGE, (), {(): figures.unmounted})
    text = "How long Prepare took, by what came of it."
    yield Metric("floe_snapshotter_prepare_seconds", text, HISTOGRAM, ("outcome",), distributions(figures.prepares))
    yield from _index(figures.index)


def _index(index: Mapping[str, Any]) -> Iterable[Metric]:
    """See MeasuredIndex.status; without an index no values."""
    kind = index.get("kind", "none")
    states: dict[tuple[str, ...], float] = {
        (kind, state): float(state == index["state"]) for state in (STATES if index else ())
    }
    yield Metric("floe_index_state", "1 for how the index answered last.", GAUGE, ("kind", "state"), states)
    times = distributions({kind: index["seconds"]} if index else None)
    yield Metric("floe_index_request_seconds", "How long the index took to answer.", HISTOGRAM, ("kind",), times)
    errors: dict[tuple[str, ...], float] = {(kind,): index["errors"]} if index else {}
    yield Metric("floe_index_errors", "Requests that the index did not answer.", COUNTER, ("kind",), errors)
