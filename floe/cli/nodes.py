"""`floe nodes`: the fleet as the index knows it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.sizes import format_seconds, format_size
from floe.store.errors import NotFoundError, PreconditionError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from floe.agent.heartbeat import Seen
    from floe.agent.orders import Order, Report


def add_parser(commands: Commands) -> None:
    """Add `floe nodes`."""
    parser = add_command(
        commands, "nodes", "Show the nodes of the fleet: who is up, what they hold, how warm orders go.", run
    )
    parser.add_argument(
        "--nodes", default="all", metavar="WHICH", help="all, a node's name, a label's key or KEY=VALUE (all)"
    )
    parser.add_argument(
        "--has", default=None, metavar="NAME|IMAGE", help="only nodes that hold all of this model or image"
    )
    parser.add_argument(
        "--forget", default=None, metavar="NODE", help="drop what was heard of a node that is gone for good"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """One line for each node that was heard lately."""
    settings = settings_of(args)
    if settings.index == "none":
        raise PreconditionError(
            "nodes know of each other by an index, and there is none", hint="set index to redis://..."
        )
    from floe.agent.fleet import Fleet  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.agent.heartbeat import state_of  # noqa: PLC0415 - likewise
    from floe.agent.selector import Selector  # noqa: PLC0415 - likewise
    from floe.cli.warm_target import resolve  # noqa: PLC0415 - likewise

    selector = Selector.parse(args.nodes)
    with open_catalog(settings) as catalog:
        fleet = Fleet(catalog)
        if args.forget is not None:
            return _forget(fleet, args.forget, json=args.json)
        wanted = set(resolve(catalog, args.has).trees) if args.has is not None else set()
        seen, orders, reports = fleet.nodes(), fleet.orders(), fleet.reports()
    found = [
        _describe(node, state_of(node, seen), orders, reports.get(name))
        for name, node in sorted(seen.items())
        if selector.matches(name, node.beat.labels) and _holds(node, wanted)
    ]
    if args.json:
        output.print_json(found)
    else:
        output.table(
            ("NODE", "STATE", "HEARD", "FLOE", "CONTAINERD", "CACHE", "MOUNTED", "WARM", "HEALTH"), map(_row, found)
        )
    return 0


def _holds(node: Seen, wanted: Collection[str]) -> bool:
    return all(node.beat.trees.get(tree) for tree in wanted)


def _forget(fleet: Any, name: str, *, json: bool) -> int:
    if name not in fleet.nodes():
        raise NotFoundError(f"nobody heard of a node {name}", hint="`floe nodes` lists them")
    fleet.forget(name)
    if json:
        output.print_json({"forgotten": name})
    else:
        output.line(f"forgot {name}; it is listed again as soon as it is heard")
    return 0


def _describe(node: Seen, state: str, orders: Mapping[str, Order], report: Report | None) -> dict[str, Any]:
    """A node as --json shows it; sizes in bytes, times in seconds."""
    beat = node.beat
    return {
        "node": beat.node,
        "state": state,
        "heard_seconds_ago": round(node.age, 1),
        "interval": beat.interval,
        "started": beat.started,
        "labels": dict(beat.labels),
        "versions": dict(beat.versions),
        "health": dict(beat.health),
        "cache": dict(beat.cache),
        "mounted": [dict(mounted) for mounted in beat.mounted],
        "trees": dict(beat.trees),
        "pins": [dict(pin) for pin in beat.pins],
        "warm": [
            {
                "order": name,
                "what": orders[name].what if name in orders else "",
                "kind": orders[name].kind if name in orders else "",
                "state": progress.state,
                "verified_bytes": progress.verified_bytes,
                "total_bytes": progress.total_bytes,
                "reason": progress.reason,
            }
            for name, progress in sorted(report.orders.items() if report is not None else ())
        ],
    }


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    cache, health = node["cache"], node["health"]
    used = f"{_size(cache.get('used_bytes'))} of {_size(cache.get('size_bytes'))}" if cache.get("size_bytes") else "-"
    ill = [f"{name} {state}" for name, state in health.items() if state != "running"]
    ill += [str(cache["problem"])] if cache.get("problem") else []
    at_work = [order for order in node["warm"] if order["state"] != "done"]
    warm = f"{len(node['warm']) - len(at_work)} done" + "".join(f", {o['what']} {o['state']}" for o in at_work)
    models = [str(mounted["model"]) for mounted in node["mounted"] if mounted.get("model")]
    mounted = f"{len(node['mounted'])} trees" + (f": {', '.join(models[:3])}" if models else "")
    return (
        node["node"],
        node["state"],
        f"{format_seconds(node['heard_seconds_ago'])} ago",
        node["versions"].get("floe", "-"),
        node["versions"].get("containerd") or "-",
        used,
        mounted if node["mounted"] else "-",
        warm if node["warm"] else "-",
        "; ".join(ill) or "ok",
    )


def _size(count: object) -> str:
    return format_size(count) if isinstance(count, int) else "?"
