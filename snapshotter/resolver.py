"""Can this layer be had lazily, in time? Look-ups with a deadline, behind a circuit breaker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import TypeVar

from floe.snapshotter.breaker import Breaker, Budgets
from floe.snapshotter.lazylayers import LazyLayers
from floe.snapshotter.lookups import LookUps
from floe.store.errors import (
    DamagedError,
    DeadlineError,
    DiskError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    TransitDamageError,
    UnavailableError,
    UnsupportedError,
    UntrustedError,
)

log = logging.getLogger(__name__)

# Why a layer is unpacked the ordinary way: the values of the fallback counter.
NOT_INDEXED, STORE_UNAVAILABLE, TIMEOUT = "not_indexed", "store_unavailable", "timeout"
BREAKER_OPEN, DAMAGED, UNTRUSTED, PACKFS, CACHE = "breaker_open", "damaged", "untrusted", "packfs", "cache"
REASONS = (NOT_INDEXED, STORE_UNAVAILABLE, TIMEOUT, BREAKER_OPEN, DAMAGED, UNTRUSTED, PACKFS, CACHE)

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
# Requests that may wait for one thing at once, the store or trees; what comes on top is turned away.
MAX_WAITING = 2 * MAX_LOOKUPS

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
        self._look_ups = LookUps(MAX_LOOKUPS)
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
        future = self._look_ups.start(lambda: self._look_up(chain_id, started + remaining))
        outcome = self._outcome(future, remaining, remaining)
        return outcome, self.budgets.after(remaining, self._clock() - started)

    def ready(self, tree: str) -> bool:
        """Whether the model's `tree`, named by an image, can be mounted at once; no network."""
        return self._layers.vouched(tree) and self.have(tree)

    def fetch_model(self, tree: str) -> Missed | None:
        """Have a model's tree, named by an image, in the node cache, if it may be mounted: None when that is done.

        Needed trees are not held back by the breaker.
        """
        until = self._clock() + self.budgets.total
        return None if self.ready(tree) else self._ask(lambda: self._vouch_and_fetch(tree, until))

    def vouch(self, tree: str) -> Missed | None:
        """Whether a model's tree, named by an image, may be mounted: None when it may."""
        return None if self._layers.vouched(tree) else self._ask(lambda: self._vouch(tree))

    def _ask(self, work: Callable[[], Found]) -> Missed | None:
        total = self.budgets.total
        outcome = self._outcome(self._look_ups.start(work), total, total)
        return outcome if isinstance(outcome, Missed) else None

    def _vouch(self, tree: str) -> Found:
        self._layers.vouch(tree)
        return Found(tree)

    def _vouch_and_fetch(self, tree: str, until: float) -> Found:
        self._layers.vouch(tree)  # first: nothing of what nobody vouches for is even fetched
        if not self.have(tree):
            self._layers.fetch(tree, max(0.001, until - self._clock()))
        return Found(tree)

    def fetch_all(self, trees: Iterable[str], timeout: float) -> dict[str, Missed]:
        """Have all `trees` in the node cache, fetched side by side within `timeout` seconds; those that are not."""
        until = self._clock() + timeout
        started: dict[str, Future[Found | None]] = {}
        for tree in trees:
            if tree not in started and not self.have(tree):
                started[tree] = self._look_ups.start(self._fetching(tree, until))
        missed = {}
        for tree, future in started.items():
            outcome = self._outcome(future, max(0.0, until - self._clock()), timeout)
            if isinstance(outcome, Missed):
                missed[tree] = outcome
        return missed

    def have(self, tree: str) -> bool:
        """Whether `tree` is in the node cache; no network."""
        try:
            return self._layers.fetch_local(tree)
        except FloeError as error:
            log.warning("tree %s in the node cache cannot be used, fetching it: %s", tree, error)
            return False

    def _fetching(self, tree: str, until: float) -> Callable[[], Found]:
        def fetch() -> Found:
            self._layers.fetch(tree, max(0.001, until - self._clock()))
            return Found(tree)

        return fetch

    def _look_up(self, chain_id: str, until: float) -> Found | None:
        tree = self._layers.resolve(chain_id)
        if tree is None:
            return None
        self._layers.fetch(tree, max(0.001, until - self._clock()))
        return Found(tree)

    def _outcome(self, future: Future[Found | None], wait: float, timeout: float) -> Found | Missed:
        """What comes of a look-up within `wait` seconds, the rest of `timeout`; tells the breaker how the store did."""
        try:
            found = _within(future, wait, timeout)
        except DeadlineError as error:
            self.breaker.failed()
            return Missed(TIMEOUT, error)
        except (NoSpaceError, DiskError) as error:
            # This node's own disk: no word about the store.
            self.breaker.undecided()
            return Missed(CACHE, error)
        except (DamagedError, TransitDamageError, UnsupportedError, NotFoundError) as error:
            # The store answered; what it holds is wrong.
            self.breaker.succeeded()
            return Missed(DAMAGED, error)
        except UntrustedError as error:
            # The store answered, what it should not have.
            self.breaker.succeeded()
            return Missed(UNTRUSTED, error)
        except FloeError as error:
            self.breaker.failed()
            return Missed(STORE_UNAVAILABLE, error)
        except BaseException:
            self.breaker.failed()
            raise
        self.breaker.succeeded()
        return found or Missed(NOT_INDEXED)


def _within(future: Future[T], wait: float, timeout: float) -> T:
    try:
        return future.result(wait)
    except Late:
        future.cancel()  # one that has not begun need not
        raise DeadlineError(
            f"the store did not answer within {timeout:.1f} s",
            hint="check that the store can be reached from this node, or raise prepare_timeout",
        ) from None
