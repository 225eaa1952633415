"""What `floe warm` shows: bars while nodes are at work, and at the end a line for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.sizes import format_seconds, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from floe.agent.watch import NodeProgress, Watch
    from floe.cli.warm_target import Target

_BARS = 20  # nodes that have one of their own; all others share one


class Quiet:
    """Shows nothing, in pipes and with --json."""

    def update(self) -> None:
        """The watch was updated."""


class _Bars(Quiet):
    """A bar for each node that is at work, as far as there is room, and one for all."""

    def __init__(self, watch: Watch, bars: RichProgress) -> None:
        self._watch = watch
        self._bars = bars
        self._all = bars.add_task("all nodes", total=None, said="")
        self._tasks: dict[str, TaskID] = {}

    def update(self) -> None:
        nodes = self._watch.nodes
        total = sum(node.progress.total_bytes for node in nodes)
        held = sum(node.progress.verified_bytes for node in nodes)
        done = sum(node.state == "done" for node in nodes)
        self._bars.update(self._all, total=total or None, completed=held, said=f"{done} of {len(nodes)} done")
        at_work = [node for node in nodes if node.state != "done"][:_BARS]
        for name in self._tasks.keys() - {node.node for node in at_work}:
            self._bars.remove_task(self._tasks.pop(name))
        for node in at_work:
            if node.node not in self._tasks:
                self._tasks[node.node] = self._bars.add_task(output.printable(node.node), total=None, said="")
            progress = node.progress
            self._bars.update(
                self._tasks[node.node],
                total=progress.total_bytes or None,
                completed=progress.verified_bytes,
                said=output.printable(_pace(node)),
            )


@contextmanager
def progress(watch: Watch, *, wanted: bool) -> Iterator[Quiet]:
    """Bars with bytes, rate and time left while the block runs, on a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield Quiet()
        return
    from rich.console import Console  # noqa: PLC0415 - some 60 ms, only for terminals
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415 - likewise

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bars(watch, bars)


def given(watch: Watch, *, json: bool) -> None:
    """An order that nobody waits for."""
    order = watch.order
    if json:
        output.print_json(
            {"order": order.id, "what": order.what, "digest": order.digest, "nodes": [n.node for n in watch.nodes]}
        )
    else:
        output.line(f"order {order.id} for {order.what} ({order.digest[:19]}) is given to {len(watch.nodes)} nodes")


def ended(watch: Watch, target: Target, *, json: bool, late: bool, stands: bool) -> None:
    """All nodes, and what became of the order. `late`: the time ran out; `stands`: nodes go on by themselves."""
    order = watch.order
    left = [node for node in watch.nodes if node.state != "done"]
    if json:
        found: dict[str, Any] = {
            "order": order.id,
            "kind": order.kind,
            "what": order.what,
            "digest": order.digest,
            "trees": list(order.trees),
            "missing_layers": list(target.missing),
            "complete": watch.done,
            "timed_out": late,
            "nodes": [node.as_json() for node in watch.nodes],
        }
        output.print_json(found)
        return
    output.table(("NODE", "STATE", "VERIFIED", "OF", ""), (_row(node) for node in watch.nodes))
    if not left:
        return
    names = ", ".join(node.node for node in left)
    why = _ADVICE.get(order.kind, "")
    if late:
        why = f"the time ran out; {'the order stands, and nodes go on' if stands else 'give it again to go on'}"
    output.note(f"error: {len(left)} of {len(watch.nodes)} nodes are not done: {names}")
    if why:
        output.note(f"hint: {why}")


def _row(node: NodeProgress) -> tuple[str, ...]:
    progress = node.progress
    return (
        node.node,
        node.state,
        format_size(progress.verified_bytes),
        format_size(progress.total_bytes) if progress.total_bytes else "",
        _pace(node) or progress.reason,
    )


def _pace(node: NodeProgress) -> str:
    progress = node.progress
    if node.state == "running" and progress.rate:
        left = progress.seconds_left
        return f"{format_size(progress.rate)}/s" + (f", {format_seconds(left)} left" if left is not None else "")
    return progress.reason if node.state != "done" else ""


_ADVICE = {
    "warm": "the order stands for nodes that come back; `floe nodes` shows them, and --check looks again",
    "check": "floe warm brings it there",
}
