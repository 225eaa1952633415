"""A circuit breaker and a shared budget of time: how long the store may hold up a pull."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

CLOSED, OPEN, PROBING = "closed", "open", "probing"
STATES = (CLOSED, OPEN, PROBING)
"""All may ask; nobody may; one asks, or whoever comes next may."""


class Breaker:
    """Opens at a failure; after `cool_down` seconds lets one caller through, whose luck decides. Thread-safe."""

    def __init__(self, cool_down: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cool_down = cool_down
        self._clock = clock
        self._lock = threading.Lock()
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> str:
        """One of STATES. Nothing asks by itself: without callers it is OPEN for `cool_down` seconds, and PROBING from then on."""
        with self._lock:
            if self._opened is None:
                return CLOSED
            return OPEN if not self._probing and self._cools_down(self._opened) else PROBING

    def allow(self) -> bool:
        """Whether to try now. Who was allowed says `succeeded`, `failed` or `undecided` afterwards."""
        with self._lock:
            if self._opened is None:
                return True
            if self._probing or self._cools_down(self._opened):
                return False
            self._probing = True
            return True

    def succeeded(self) -> None:
        """The store answered."""
        with self._lock:
            self._opened = None
            self._probing = False

    def failed(self) -> None:
        """The store did not answer, or not in time."""
        with self._lock:
            self._opened = self._clock()
            self._probing = False

    def undecided(self) -> None:
        """What was tried failed for a reason of this node's: the next caller may try."""
        with self._lock:
            self._probing = False

    def _cools_down(self, opened: float) -> bool:
        return self._clock() - opened < self._cool_down


class Budgets:
    """What is left of a pull's time for look-ups, handed from each layer's snapshot to the next layer's.

    containerd does not say which requests belong to one pull, but each layer's parent is the snapshot of the layer
    below: so the remainder is kept by snapshot id, and grows back to `total` seconds within `refill` seconds. A look-up
    answered within `free` seconds costs nothing: an image of 100 layers must not run out of time by its good answers.
    So the look-ups of a pull of n layers take at most `total` + n * `free` seconds, plus `total` for each `refill` seconds
    the pull lasts. Thread-safe.
    """

    def __init__(
        self, total: float, *, free: float, refill: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self._free = free
        self._refill = refill
        self._clock = clock
        self._lock = threading.Lock()
        self._left: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def remaining(self, parent: int) -> float:
        """Seconds left for a look-up above the snapshot `parent` (0: none, a pull's first layer)."""
        with self._lock:
            if parent not in self._left:
                return self.total
            left, since = self._left[parent]
            return min(self.total, left + self.total * (self._clock() - since) / self._refill)

    def after(self, remaining: float, spent: float) -> float:
        """What is left of `remaining` after a look-up that took `spent` seconds."""
        return remaining if spent <= self._free else max(0.0, remaining - spent + self._free)

    def keep(self, snapshot: int, remaining: float) -> None:
        """Hand `remaining` seconds on to look-ups above `snapshot`."""
        with self._lock:
            now = self._clock()
            self._left[snapshot] = (remaining, now)
            self._left.move_to_end(snapshot)
            while now - next(iter(self._left.values()))[1] >= self._refill:
                self._left.popitem(last=False)
