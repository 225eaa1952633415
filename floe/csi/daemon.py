"""`floe csi` as a process: start, serve until told to stop, leave every mount as it is."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from floe import __version__
from floe.csi.rules import Rule
from floe.csi.service import DriverService, server
from floe.csi.volumes import Volumes
from floe.mount.mounter import TreeMounter
from floe.rpc.sockets import check_address
from floe.store.cache import Cache
from floe.store.catalog import Catalog
from floe.store.eventlog import EventLog
from floe.store.exposition import COUNTER, GAUGE, Metric, MetricsServer
from floe.store.histogram import Distribution
from floe.store.ids import ModelRef
from floe.store.loglevel import Follower
from floe.store.process import Heartbeat, own_directory, refuse_own_mount, sd_notify
from floe.store.stopsignal import stop_signal
from floe.store.trees import TreeStore

log = logging.getLogger(__name__)

_KEEP = 30.0  # seconds between two looks at what is mounted
_PATIENCE = 5.0  # seconds that an unmount waits for reads in flight


@dataclass(frozen=True)
class CsiConfig:
    """Settings of `floe csi`.

    `address` is the unix socket that a kubelet dials, `node` what it is told of this node's name. `rules`: which pods may
    have which models. `parse` and `stop_packfs`: see floe.csi.volumes. `mounter` and `loop`: see floe.mount.mounter.
    `metrics_address` is a unix socket or loopback HOST:PORT, None for no metrics.
    """

    address: Path
    run_dir: Path
    node: str
    rules: tuple[Rule, ...]
    parse: Callable[[str], ModelRef]
    stop_packfs: Callable[[], None]
    mounter: str = "auto"
    loop: str = "auto"
    metrics_address: str | None = None


def serve(config: CsiConfig, catalog: Catalog, cache: Cache) -> int:
    """Run in the foreground until SIGTERM or SIGINT; 0 then. What was published before is in its place before anybody can dial.

    BadInputError: a socket's path that is too long. BusyError when another driver owns the run directory or the socket,
    PreconditionError when this process runs from a Floe mount, and whatever keeps directories or sockets from being used.
    """
    check_address(config.address)
    refuse_own_mount(config.run_dir)
    with own_directory(config.run_dir, "csi"), ExitStack() as stack:
        stop = stop_signal()
        stack.enter_context(closing(Follower(config.run_dir)))
        events = stack.enter_context(closing(EventLog(config.run_dir, "csi")))
        events.add("csi", pid=os.getpid(), version=__version__)
        mounter = TreeMounter(config.run_dir, cache, loop=config.loop, kind=config.mounter, patience=_PATIENCE)
        volumes = Volumes(
            catalog,
            TreeStore(catalog.store, cache),
            mounter,
            config.rules,
            parse=config.parse,
            stop_packfs=config.stop_packfs,
        )
        volumes.keep()
        service = DriverService(volumes, config.node)
        if config.metrics_address is not None:
            stack.callback(MetricsServer(config.metrics_address, lambda: exposition(service, volumes)).close)
        listening = server(config.address, service)
        listening.start()
        aside = threading.Thread(target=_keep, args=(volumes, stop), name="keep", daemon=True)
        aside.start()
        stack.callback(aside.join)
        stack.callback(listening.stop)
        stack.callback(stop.set)
        log.info("serving volumes at %s", config.address)
        sd_notify("READY=1")
        heartbeat = Heartbeat()
        while not stop.wait(heartbeat.pause):
            heartbeat.beat()
        sd_notify("STOPPING=1")
        log.info("stopping; mounts stay as they are")
    return 0


def exposition(service: DriverService, volumes: Volumes) -> Iterable[Metric]:
    """The metrics of a driver."""
    done: dict[tuple[str, ...], float | Distribution] = {
        (what, outcome): number for (what, outcome), number in service.counted().items()
    }
    restored: dict[tuple[str, ...], float | Distribution] = {
        (outcome,): number for outcome, number in volumes.restored.items()
    }
    text = "Requests to publish or unpublish a volume, by their status."
    yield Metric("floe_csi_requests", text, COUNTER, ("request", "outcome"), done)
    yield Metric("floe_csi_restored", "Volumes mounted again after they were lost.", COUNTER, ("outcome",), restored)
    yield Metric("floe_csi_volumes", "Volumes published.", GAUGE, (), {(): len(volumes.published())})


def _keep(volumes: Volumes, stop: threading.Event) -> None:
    while not stop.wait(_KEEP):
        try:
            volumes.keep()
        except Exception:
            log.exception("volumes cannot be looked after")
