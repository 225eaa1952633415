"""Can this layer be had lazily, in time? Look-ups with a deadline, behind a circuit breaker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from floe.snapshotter.breaker import Breaker, Budgets
from floe.snapshotter.lazylayers import LazyLayers
from floe.store.errors import (
    DamagedError,
    DeadlineError,
    FloeError,
    NotFoundError,
    TransitDamageError,
    UnavailableError,
    UnsupportedError,
)

log = logging.getLogger(__name__)

# Why a layer is unpacked the ordinary way: the values of the fallback counter.
NOT_INDEXED, STORE_UNAVAILABLE, TIMEOUT = "not_indexed", "store_unavailable", "timeout"
BREAKER_OPEN, DAMAGED, PACKFS = "breaker_open", "damaged", "packfs"
REASONS = (NOT_INDEXED, STORE_UNAVAILABLE, TIMEOUT, BREAKER_OPEN, DAMAGED, PACKFS)

# After a failure the store is left alone this long, in seconds: long enough that the pulls of a busy node do not each
# wait in vain, short enough that a store that came back is used again by the next pull.
COOL_DOWN = 5.0
# A pull's waiting time grows back within this many seconds: about as long as an ordinary unpack takes.
REFILL = 60.0
# A look-up faster than this part of the whole time costs nothing.
FREE_PART = 1 / 8
# Look-ups under way at once. One that outlived its deadline keeps its place until it returns, so a hung store ties up
# so many threads and no more; the server's threads never wait for it longer than the deadline.
MAX_LOOKUPS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """The layer's tree is in the node cache, ready to be mounted."""

    tree: str


@dataclass(frozen=True)
class Missed:
    """The layer cannot be had lazily now; `reason` is one of REASONS, `error` what happened (None: nothing did)."""

    reason: str
    error: FloeError | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.error}" if self.error else self.reason


class Resolver:
    """Finds and fetches trees for the snapshotter. Thread-safe; no call takes longer than `timeout` seconds."""

    def __init__(self, layers: LazyLayers, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._layers = layers
        self._clock = clock
        self._places = threading.BoundedSemaphore(MAX_LOOKUPS)
        self.breaker = Breaker(COOL_DOWN, clock)
        self.budgets = Budgets(timeout, free=timeout * FREE_PART, refill=REFILL, clock=clock)

    def find(self, chain_id: str, parent: int) -> tuple[Found | Missed, float]:
        """The tree of a chain id asked for above snapshot `parent`, and the seconds left for the layers above."""
        remaining = self.budgets.remaining(parent)
        if remaining <= 0:
            return Missed(TIMEOUT, DeadlineError("earlier layers of this pull used up its time for look-ups")), 0.0
        if not self.breaker.allow():
            return Missed(BREAKER_OPEN, UnavailableError("the store failed a moment ago and is left alone")), remaining
        started = self._clock()
        outcome = self._outcome(lambda: self._look_up(chain_id, started + remaining), remaining)
        return outcome, self.budgets.after(remaining, self._clock() - started)

    def fetch(self, tree: str) -> Missed | None:
        """Have `tree` in the node cache: None when it is there. Needed trees are not held back by the breaker."""
        try:
            if self._layers.fetch_local(tree):
                return None
        except FloeError as error:
            log.warning("tree %s in the node cache cannot be used, fetching it: %s", tree, error)
        timeout = self.budgets.total

        def fetch() -> Found:
            self._layers.fetch(tree, timeout)
            return Found(tree)

        outcome = self._outcome(fetch, timeout)
        return outcome if isinstance(outcome, Missed) else None

    def _look_up(self, chain_id: str, until: float) -> Found | None:
        tree = self._layers.resolve(chain_id)
        if tree is None:
            return None
        self._layers.fetch(tree, max(0.001, until - self._clock()))
        return Found(tree)

    def _outcome(self, work: Callable[[], Found | None], timeout: float) -> Found | Missed:
        """Do `work` within `timeout` seconds and tell the breaker how the store did."""
        try:
            found = self._within(work, timeout)
        except DeadlineError as error:
            self.breaker.failed()
            return Missed(TIMEOUT, error)
        except (DamagedError, TransitDamageError, UnsupportedError, NotFoundError) as error:
            # The store answered; what it holds is wrong.
            self.breaker.succeeded()
            return Missed(DAMAGED, error)
        except FloeError as error:
            self.breaker.failed()
            return Missed(STORE_UNAVAILABLE, error)
        except BaseException:
            self.breaker.failed()
            raise
        self.breaker.succeeded()
        return found or Missed(NOT_INDEXED)

    def _within(self, work: Callable[[], T], timeout: float) -> T:
        late = DeadlineError(
            f"the store did not answer within {timeout:.1f} s",
            hint="check that the store can be reached from this node, or raise prepare_timeout",
        )
        until = self._clock() + timeout
        if not self._places.acquire(timeout=timeout):
            raise late
        answers: SimpleQueue[T | BaseException] = SimpleQueue()

        def run() -> None:
            try:
                answers.put(work())
            except BaseException as error:
                answers.put(error)
            finally:
                self._places.release()

        # A daemon thread: one that hangs in the store must not keep the process from ending.
        threading.Thread(target=run, name="look-up", daemon=True).start()
        try:
            answer = answers.get(timeout=max(0.0, until - self._clock()))
        except Empty:
            raise late from None
        if isinstance(answer, BaseException):
            raise answer
        return answer
