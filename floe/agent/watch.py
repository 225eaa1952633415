"""How far all nodes are with an order, put together from what they said and from how long they were silent. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from floe.agent.heartbeat import LOST, STOPPED, Seen, state_of
from floe.agent.orders import CANCEL, CANCELLED, DONE, FINAL, FULL, WAITING, Order, Progress, Report

ENDED = (*FINAL, FULL, LOST, STOPPED)
"""States in which nobody need wait for a node any longer; the last three may pass by themselves while others are at work."""


@dataclass(frozen=True)
class NodeProgress:
    """One node's progress; its `state` may also be LOST or STOPPED. `age`: seconds since it was heard."""

    node: str
    progress: Progress
    age: float

    @property
    def state(self) -> str:
        """See Progress."""
        return self.progress.state

    def as_json(self) -> dict[str, Any]:
        """For --json; sizes in bytes, `seconds_left` null when nobody can tell."""
        left = None if self.progress.seconds_left is None else round(self.progress.seconds_left, 1)
        return {"node": self.node, **asdict(self.progress), "seconds_left": left, "heard_seconds_ago": self.age}


class Watch:
    """The nodes that `order` is for: those that were up when it was given, and those that came since. `update` after each look.

    `others` are watched with it: a node is as far as with the one that it is furthest back with.
    """

    def __init__(self, order: Order, others: Sequence[Order] = ()) -> None:
        self.order = order
        self.orders = (*others, order)
        self._expected: dict[str, None] = {}
        self._last: dict[tuple[str, str], Progress] = {}  # by node and order
        self._heard: dict[str, tuple[Seen, float]] = {}  # by node: its last heartbeat, and when it was looked at
        self.nodes: tuple[NodeProgress, ...] = ()

    def update(self, nodes: Mapping[str, Seen], reports: Mapping[str, Report], now: float = 0.0) -> None:
        """What the index says `now`, in seconds of any clock. A node that was there once is never left out again.

        One that the index does not name any more has been silent since it was named last: the index may have been emptied.
        """
        self._heard |= {name: (seen, now) for name, seen in nodes.items()}
        silent = {name: replace(s, age=s.age + now - at) for name, (s, at) in self._heard.items() if name not in nodes}
        nodes = {**silent, **nodes}
        states = {name: state_of(seen, nodes) for name, seen in nodes.items()}
        for name, seen in nodes.items():
            if states[name] != STOPPED and self._of(name, seen):
                self._expected[name] = None
        found = []
        for name in sorted(self._expected):
            report, heard = reports.get(name), nodes[name]
            last = [self._progress(name, order, report) for order in self._of(name, heard) or [self.order]]
            behind = min(last, key=lambda progress: (progress.state == DONE, progress.state in FINAL))
            found.append(NodeProgress(name, _judged(behind, states[name], heard), round(heard.age, 1)))
        self.nodes = tuple(found)

    def _of(self, name: str, seen: Seen) -> list[Order]:
        return [order for order in self.orders if order.nodes.matches(name, seen.beat.labels)]

    def _progress(self, name: str, order: Order, report: Report | None) -> Progress:
        """What a node said last of an order."""
        said = report.orders.get(order.id) if report is not None else None
        if order.kind == CANCEL and said is not None:
            # It has the id of what it cancels: what a node said of that is no answer to it.
            said = replace(said, state=DONE) if said.state == CANCELLED else None
        if said is not None:
            self._last[name, order.id] = said
        return self._last.get((name, order.id)) or Progress(WAITING, total_bytes=order.content_bytes)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to wait for."""
        return all(node.state in ENDED for node in self.nodes)

    @property
    def done(self) -> bool:
        """Whether every node holds, verified, all that was ordered."""
        return bool(self.nodes) and all(node.state == DONE for node in self.nodes)


def _judged(last: Progress, state: str, seen: Seen) -> Progress:
    if last.state in FINAL or state not in (LOST, STOPPED):
        return last  # what was verified before it fell silent is verified
    reason = "its agent was stopped" if state == STOPPED else f"no heartbeat for {seen.age:.0f} s"
    return Progress(state, last.verified_bytes, last.total_bytes, 0.0, reason)
