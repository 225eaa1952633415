"""The notes that nodes and operators leave each other in the index."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from floe.agent.heartbeat import Heartbeat, Seen
from floe.agent.orders import Order, Report
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.index import Index, Note
from floe.store.index.topics import NODES, ORDERS, STATES

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Fleet:
    """What stands in the index of `catalog`. Raises the store's errors, once, for the store's name; then UnavailableError alone."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._told: set[tuple[str, str, str]] = set()

    def nodes(self) -> dict[str, Seen]:
        """All nodes that were heard lately, by name."""
        return self._read(NODES, lambda note: Seen(Heartbeat.decode(note.data), note.age))

    def beat(self, beat: Heartbeat) -> None:
        """Say how a node is."""
        self._index().put_note(NODES, beat.node, beat.encode(), beat.kept)

    def forget(self, node: str) -> None:
        """Drop what was heard of a node, until it says something again."""
        self._index().delete_note(NODES, node)
        self._index().delete_note(STATES, node)

    def orders(self) -> dict[str, Order]:
        """All orders that count, by id."""
        return self._read(ORDERS, lambda note: Order.decode(note.data))

    def give(self, order: Order) -> None:
        """Put an order, in place of the one with its id."""
        self._index().put_note(ORDERS, order.id, order.encode(), order.seconds)

    def withdraw(self, order_id: str) -> None:
        """Take an order away, so that nodes that did not see it never do."""
        self._index().delete_note(ORDERS, order_id)

    def reports(self) -> dict[str, Report]:
        """What nodes say of their orders, by node."""
        return self._read(STATES, lambda note: Report.decode(note.data))

    def report(self, node: str, report: Report, seconds: float) -> None:
        """Say how a node's orders are; it counts for so long."""
        self._index().put_note(STATES, node, report.encode(), seconds)

    def _index(self) -> Index:
        self._catalog.check_store()
        return self._catalog.index

    def _read(self, topic: str, decode: Callable[[Note], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        notes: Mapping[str, Note] = self._index().notes(topic)
        for name, note in notes.items():
            try:
                found[name] = decode(note)
            except (DamagedError, UnsupportedError) as error:
                if (topic, name, str(error)) not in self._told:  # said once
                    self._told.add((topic, name, str(error)))
                    _log.warning("note %s of %s in the index is passed over: %s", name, topic, error)
        return found
