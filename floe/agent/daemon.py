"""`floe agent` as a process: it may be killed at any moment, and nobody waits for it.

All that it knows stands elsewhere: orders and heartbeats in the index, pins and content in the node cache.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from floe.agent.beating import Beating, Facts
from floe.agent.duties import Duty, Running
from floe.agent.fleet import Fleet
from floe.agent.orders import DONE, FAILED, REFUSED
from floe.agent.pins import WarmPins
from floe.agent.warming import Warming
from floe.protos.packfs_control import PackfsClient
from floe.store.cache import Cache
from floe.store.catalog import Catalog
from floe.store.exposition import COUNTER, GAUGE, Metric, MetricsServer
from floe.store.histogram import Distribution
from floe.store.loglevel import Follower
from floe.store.process import Heartbeat, own_directory, refuse_own_mount, sd_notify
from floe.store.trees import TreeStore

Values: TypeAlias = "dict[tuple[str, ...], float | Distribution]"
_log = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds for the duties to end
_HANGS = 300.0  # seconds of one turn, after which systemd is no longer told that all is well
_TICK = 1.0  # seconds between looks whether they hang


@dataclass(frozen=True)
class AgentConfig:
    """`node` and its `labels`; `interval`: seconds between heartbeats; `budget`: bytes for warm orders; where metrics are served."""

    run_dir: Path
    node: str
    labels: Mapping[str, str]
    interval: float
    budget: int
    metrics_address: str | None = None


def serve(config: AgentConfig, catalog: Catalog, cache: Cache, facts: Facts, more: Sequence[Duty] = ()) -> int:
    """Run in the foreground until SIGTERM or SIGINT; 0 then. `facts`: see Beating. `more`: duties besides its own.

    BusyError when another agent owns the run directory, PreconditionError when this process runs from a Floe mount.
    """
    refuse_own_mount(config.run_dir)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with own_directory(config.run_dir, "agent"), ExitStack() as stack:
        stack.enter_context(closing(Follower(config.run_dir)))
        fleet = Fleet(catalog)
        warming = Warming(
            fleet,
            TreeStore(catalog.store, cache),
            WarmPins(cache, config.budget),
            PackfsClient(config.run_dir),
            node=config.node,
            labels=config.labels,
        )
        beating = Beating(fleet, facts, node=config.node, labels=config.labels, interval=config.interval)
        duties: tuple[Duty, ...] = (beating, warming, *more)  # what an agent does; each is on its own
        running = Running(duties)
        if config.metrics_address is not None:
            began = time.monotonic()
            server = MetricsServer(
                config.metrics_address, lambda: agent_metrics(running, warming, time.monotonic() - began)
            )
            stack.callback(server.close)
        running.start()
        sd_notify("READY=1")
        _log.info("node %s, %s", config.node, catalog.index.url)
        watchdog = Heartbeat()
        while not stop.wait(min(_TICK, watchdog.pause or _TICK)):
            if max(running.ages().values()) < _HANGS:
                watchdog.beat()
        sd_notify("STOPPING=1")
        running.stop(_PATIENCE)
    return 0


def agent_metrics(running: Running, warming: Warming, uptime: float) -> Iterable[Metric]:
    """What an agent exports."""
    active = warming.active
    yield Metric("floe_agent_uptime_seconds", "Since the agent started", GAUGE, (), {(): uptime})
    failures: Values = {(name,): float(count) for name, count in running.failures.items()}
    yield Metric("floe_agent_failures", "Turns of a duty that failed", COUNTER, ("duty",), failures)
    ended: Values = {(state,): float(warming.counts[state]) for state in (DONE, FAILED, REFUSED)}
    yield Metric("floe_agent_warm_ended", "Warm orders that ended here", COUNTER, ("state",), ended)
    yield Metric("floe_agent_warm_orders", "Warm orders at work", GAUGE, (), {(): float(len(active))})
    left = sum(progress.total_bytes - progress.verified_bytes for progress in active)
    yield Metric("floe_agent_warm_left_bytes", "Bytes that these still need", GAUGE, (), {(): float(left)})
