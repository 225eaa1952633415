"""The duty of warm orders: what operators want of this node is fetched, pinned, checked or unpinned, and reported.

The pack filesystem's worker fetches, for it owns the cache; here trees and pack indexes are brought, pins set, and the worker asked
again and again, so that its successor goes on where it was killed. This process may be killed, too: orders stand in the index, pins on
the cache's disk, and what was fetched is found there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from floe.agent.fleet import Fleet
from floe.agent.orders import (
    CANCEL,
    CANCELLED,
    CHECK,
    DONE,
    FAILED,
    FINAL,
    FULL,
    INCOMPLETE,
    REFUSED,
    RUNNING,
    UNPIN,
    WAITING,
    WARM,
    Order,
    Progress,
    Report,
)
from floe.agent.pins import WarmPins
from floe.store.errors import (
    BadInputError,
    DamagedError,
    DeadlineError,
    FloeError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.trees import LocalTree, in_parallel

_log = logging.getLogger(__name__)
_IDLE, _BUSY = 3.0, 1.0  # seconds between turns, without an order at work and with one
_READ = 3.0  # seconds between looks for orders
_REPEAT = 60.0  # seconds after which a report is given again though nothing changed
_REPORT_KEPT = 3600.0  # seconds
_FETCH = 300.0  # seconds that a tree with its packs' indexes may take
_SMOOTH = 0.3  # weight of the last rate measured
_LASTING = (NotFoundError, DamagedError, UnsupportedError, BadInputError)


class Trees(Protocol):
    """See TreeStore."""

    def fetch(self, digest: str, deadline: float) -> LocalTree:
        """The tree, fetched if need be within `deadline` seconds."""
        ...

    def fetch_local(self, digest: str) -> LocalTree | None:
        """The tree, if it is here."""
        ...


class Worker(Protocol):
    """See PackfsClient."""

    def warm(
        self, name: str, trees: Iterable[str], *, profile: bool, pinned: bool, fetch: bool, deep: bool
    ) -> dict[str, Any]:
        """How far the worker is."""
        ...

    def forget(self, name: str) -> None:
        """Give it up."""
        ...


class _Work:
    """An order of this node's. `accepted`: its budget was asked, its pins are set."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.accepted = False
        self.fetch: _Fetch | None = None
        self.progress = Progress(WAITING, total_bytes=order.content_bytes)
        self.measured: tuple[float, int] | None = None  # when, and bytes then
        self.rate = 0.0


class _Fetch(threading.Thread):
    """Brings trees and their packs' indexes onto this node. A daemon: a silent store must not keep a process from ending."""

    def __init__(self, trees: Trees, digests: list[str]) -> None:
        super().__init__(name="warm-trees", daemon=True)
        self.error: FloeError | None = None
        self._trees = trees
        self._digests = digests

    def run(self) -> None:
        try:
            in_parallel(self._fetch, self._digests)
        except FloeError as error:
            self.error = error
        except Exception as error:
            self.error = FloeError(f"its trees could not be fetched: {error!r}")

    def _fetch(self, tree: str) -> None:
        self._trees.fetch(tree, _FETCH)


class Warming:
    """Works on the orders in `fleet` for the node `node`."""

    name = "warm orders"
    again = _READ

    def __init__(
        self,
        fleet: Fleet,
        trees: Trees,
        pins: WarmPins,
        worker: Worker,
        *,
        node: str,
        labels: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._trees = trees
        self._pins = pins
        self._worker = worker
        self._node = node
        self._labels = dict(labels)
        self._clock = clock
        self._works: dict[str, _Work] = {}
        self._read_from = 0.0
        self._reported: Report | None = None
        self._report_again = 0.0
        self.counts = dict.fromkeys((DONE, FAILED, REFUSED), 0)

    def turn(self) -> float:
        """See what is ordered, go on with it, and report. The index's errors, after the work."""
        problem: FloeError | None = None
        if self._clock() >= self._read_from:
            try:
                self._take(self._fleet.orders())
                self._read_from = self._clock() + _READ
            except UnavailableError as error:  # what is known already goes on
                problem = error
        for work in self._works.values():
            if work.progress.state not in FINAL:
                self._go_on(work)
        self._report()
        if problem is not None:
            raise problem
        return _BUSY if self.active else _IDLE

    def end(self) -> None:
        """Nothing: the worker goes on with what it was told, and the next agent asks for it."""

    @property
    def active(self) -> list[Progress]:
        """How far the orders are that are not ended."""
        return [work.progress for work in self._works.values() if work.progress.state not in FINAL]

    # orders

    def _take(self, orders: Mapping[str, Order]) -> None:
        """Orders that are new, changed, or no longer there. One that vanished goes on until it is done: the index may have been emptied."""
        for name, order in orders.items():
            known = self._works.get(name)
            if not order.nodes.matches(self._node, self._labels):
                if known is not None:
                    self._drop(name)
            elif known is None or known.order != order:
                if known is not None and known.order.kind == WARM and order.kind == CANCEL:
                    self._give_up(known)
                _log.info(
                    "%s %s (%s), order %s of %s", order.kind, order.what, order.digest, name, order.by or "nobody"
                )
                self._works[name] = _Work(order)
        for name in [n for n, work in self._works.items() if n not in orders and work.progress.state in FINAL]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        work = self._works.pop(name)
        self._give_up(work)

    def _give_up(self, work: _Work) -> None:
        try:
            self._worker.forget(work.order.id)
        except FloeError as error:  # then it forgets by itself
            _log.debug("%s", error)

    def _go_on(self, work: _Work) -> None:
        try:
            progress = self._worked(work)
        except _LASTING as error:
            progress = Progress(FAILED, total_bytes=work.order.content_bytes, reason=str(error))
        except (FloeError, OSError) as error:
            known = work.progress
            progress = Progress(WAITING, known.verified_bytes, known.total_bytes, 0.0, str(error))
        work.progress = progress
        if progress.state in FINAL:
            if progress.state in self.counts and work.order.kind == WARM:
                self.counts[progress.state] += 1
            _log.info("order %s, %s: %s %s", work.order.id, work.order.what, progress.state, progress.reason)

    def _worked(self, work: _Work) -> Progress:
        order = work.order
        if order.kind == CANCEL:
            return Progress(CANCELLED, reason="given up")
        if order.kind == UNPIN:
            count = self._pins.unpin(order.trees, order.what, order.at)
            return Progress(DONE, reason=f"{count} pinned trees let go")
        if order.kind == WARM and self._is_countermanded(order):
            self._give_up(work)
            return Progress(CANCELLED, reason="unpinned by a later order")
        trees = self._local(work)
        if trees is None:
            return Progress(INCOMPLETE, 0, order.content_bytes, reason="not all of its trees are here")
        if order.kind == WARM and not work.accepted:
            refusal = "" if order.profile_only and not order.pin else self._pins.refusal(trees, pin=order.pin)
            if refusal:
                return Progress(REFUSED, total_bytes=order.content_bytes, reason=refusal)
            if order.pin:
                for tree in trees:
                    self._pins.pin(tree, order)
            work.accepted = True
        answer = self._worker.warm(
            order.id,
            order.trees,
            profile=order.profile_only,
            pinned=order.pin,
            fetch=order.kind == WARM,
            deep=order.deep,
        )
        return self._judged(work, answer)

    def _is_countermanded(self, order: Order) -> bool:
        """Whether somebody ordered its trees unpinned since: a new agent must not pin them again."""
        return order.pin and any(
            other.kind == UNPIN
            and other.at > order.at
            and (other.what == order.what or set(order.trees) <= set(other.trees))
            for other in (work.order for work in self._works.values())
        )

    def _local(self, work: _Work) -> list[LocalTree] | None:
        """The order's trees with their packs' indexes, fetched if it is to be fetched. DeadlineError while they are on their way."""
        order = work.order
        if order.kind == CHECK:
            found = [self._trees.fetch_local(tree) for tree in order.trees]
            return None if None in found else [tree for tree in found if tree is not None]
        here = [self._trees.fetch_local(tree) for tree in order.trees]
        if None not in here:
            return [tree for tree in here if tree is not None]
        if work.fetch is None:
            work.fetch = _Fetch(self._trees, list(order.trees))
            work.fetch.start()
        if work.fetch.is_alive():
            raise DeadlineError("its trees and pack indexes are being fetched")
        failed, work.fetch = work.fetch.error, None  # the next turn begins another
        raise failed or DeadlineError("its trees were fetched, and are being looked at")

    def _judged(self, work: _Work, answer: Mapping[str, Any]) -> Progress:
        """What the worker says, with a rate."""
        state, verified, total = answer["state"], int(answer["verified_bytes"]), int(answer["content_bytes"])
        now = self._clock()
        if work.measured is not None and now > work.measured[0]:
            rate = max(0, verified - work.measured[1]) / (now - work.measured[0])
            work.rate = rate if not work.rate else _SMOOTH * rate + (1 - _SMOOTH) * work.rate
        work.measured = now, verified
        problem = str(answer.get("problem", ""))
        if state == "planning":
            return Progress(WAITING, 0, work.order.content_bytes, reason=problem)
        if state in (DONE, FAILED):
            return Progress(state, verified, total, reason=problem)
        if work.order.kind == CHECK and state == INCOMPLETE:
            return Progress(INCOMPLETE, verified, total, reason=problem or "not all of it is here")
        shown = FULL if state == FULL else RUNNING if state in ("running", INCOMPLETE) else WAITING
        return Progress(shown, verified, total, work.rate if shown == RUNNING else 0.0, problem)

    # reports

    def _report(self) -> None:
        report = Report({name: work.progress for name, work in self._works.items()})
        changed = report != self._reported
        if not changed and (not report.orders or self._clock() < self._report_again):
            return
        self._fleet.report(self._node, report, _REPORT_KEPT)
        self._reported = report
        self._report_again = self._clock() + _REPEAT
