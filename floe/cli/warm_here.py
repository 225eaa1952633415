"""`floe warm` on a machine of its own: the agent's work on one order, done by the command, while it waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from floe.agent.fleet import Fleet
from floe.agent.heartbeat import Heartbeat
from floe.agent.pins import WarmPins
from floe.agent.warming import Warming
from floe.cli import output
from floe.cli.context import open_cache
from floe.protos.packfs_control import PackfsClient
from floe.store.catalog import Catalog
from floe.store.index.memory import MemoryIndex
from floe.store.trees import TreeStore

if TYPE_CHECKING:
    from floe.agent.orders import Order
    from floe.cli.settings import Settings

_TURN = 0.5  # seconds between turns


@contextmanager
def here(settings: Settings, catalog: Catalog, order: Order) -> Iterator[Fleet]:
    """A fleet of this node alone, in memory, that works on what it is told until the block ends. UnavailableError: nobody serves."""
    client = PackfsClient(settings.run_dir)
    if order.kind in ("warm", "check"):
        client.ping()
    labels: Mapping[str, str] = settings.node_labels.by_key
    cache = open_cache(settings)
    fleet = Fleet(Catalog(catalog.store, MemoryIndex()))
    beat = Heartbeat(node=settings.node, labels=labels, interval=settings.heartbeat)
    fleet.beat(beat)
    pins = WarmPins(cache, settings.warm_budget.of(cache.size or 0))
    duty = Warming(fleet, TreeStore(catalog.store, cache), pins, client, node=settings.node, labels=labels)
    stop = threading.Event()
    told: set[str] = set()

    def work() -> None:
        while not stop.wait(_TURN):
            try:
                fleet.beat(beat)
                duty.turn()
            except Exception as error:  # the next turn may do it; a thread that ended would leave the command waiting
                if str(error) not in told:  # said once
                    told.add(str(error))
                    output.note(f"{error}; it is tried again")

    thread = threading.Thread(target=work, name="warm-here", daemon=True)
    thread.start()
    try:
        yield fleet
    finally:
        stop.set()
        thread.join()
