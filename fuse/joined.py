"""Orders of completion from several parts of the worker, as one list: what somebody asked for comes before what is mounted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from floe.store.completion import Order


class Completing(Protocol):
    """See PackReader.complete."""

    def complete(self, orders: Sequence[Order]) -> None:
        """Fetch these."""
        ...


class Joined:
    """Hands `reader` the orders of `parts` parts, those of part 0 first. Thread-safe."""

    def __init__(self, reader: Completing, parts: int) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._orders: list[tuple[Order, ...]] = [()] * parts

    def part(self, number: int) -> Completing:
        """What takes one part's orders, in place of its orders before."""
        return _Part(self, number)

    def set(self, number: int, orders: Sequence[Order]) -> None:
        """The orders of one part from now on."""
        with self._lock:  # held while it is told: the last word must be the latest
            self._orders[number] = tuple(orders)
            self._reader.complete([order for part in self._orders for order in part])


class _Part:
    def __init__(self, joined: Joined, number: int) -> None:
        self._joined = joined
        self._number = number

    def complete(self, orders: Sequence[Order]) -> None:
        self._joined.set(self._number, orders)
