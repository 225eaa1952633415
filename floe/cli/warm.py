"""`floe warm`: models and images planted on nodes ahead of their use."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from floe.cli import output, warm_show
from floe.cli.context import open_catalog, whoami
from floe.cli.options import Commands, add_command, add_json, add_settings, settings_of
from floe.cli.sizes import parse_seconds
from floe.store.errors import BadInputError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from floe.agent.fleet import Fleet
    from floe.agent.orders import Order
    from floe.agent.watch import Watch
    from floe.cli.settings import Settings
    from floe.cli.warm_target import Target
    from floe.store.catalog import Catalog

_COUNTS_FOR = "24h"
_CHECK_SECONDS = 300  # for which the order of a check counts
_LOOK = 1.0  # seconds between two looks at the nodes


def add_parser(commands: Commands) -> None:
    """Add `floe warm`."""
    parser = add_command(commands, "warm", "Bring a model or an image onto nodes before anybody starts it.", run)
    parser.add_argument("name", metavar="NAME|IMAGE", help="a model, or an indexed image")
    parser.add_argument(
        "--nodes",
        default="all",
        metavar="WHICH",
        help="all, a node's name, a label's key or KEY=VALUE; several with commas (all)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fetch nothing: say which nodes hold all of it, verified")
    what.add_argument(
        "--unpin", action="store_true", help="no longer keep it; what is there stays until its room is needed"
    )
    what.add_argument(
        "--cancel", action="store_true", help="take back the orders for it; what is there stays, and pins do"
    )
    parser.add_argument("--pin", action="store_true", help="keep it: what was not used for longest goes for it")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, kept with the pin")
    parser.add_argument(
        "--profile-only", action="store_true", help="only what starts read first, by the start-up profile"
    )
    parser.add_argument("--deep", action="store_true", help="with --check: hash what is on the nodes' disks")
    parser.add_argument("--timeout", default=None, metavar="SPAN", help="wait no longer than that, for example 30m")
    parser.add_argument(
        "--for",
        dest="span",
        default=_COUNTS_FOR,
        metavar="SPAN",
        help=f"how long the order counts, for nodes that join too ({_COUNTS_FOR})",
    )
    parser.add_argument("--no-wait", action="store_true", help="only give the order")
    add_settings(parser, "trusted_keys", "warm_budget", "node_name", "node_labels")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Give an order and see it done. 0: every node holds every frame, verified; 1: not, and the list says which."""
    _check(args)
    settings = settings_of(args)
    from floe.cli.warm_target import known, named, resolve  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings, trusting=True) as catalog:
        back = args.unpin or args.cancel  # also of what the store has no longer
        target = named(args.name) if back and not known(catalog, args.name) else resolve(catalog, args.name)
        order = _order(args, target)
        if order.profile_only:
            _check_profile(catalog, target)
        with _fleet(settings, catalog, order, wait=not args.no_wait) as (fleet, stands):
            watch = _give(fleet, order, wait=not args.no_wait)
            if target.missing and not args.json:
                output.note(
                    f"{len(target.missing)} layers of {target.name} are not in the store; nodes unpack them in the ordinary way"
                )
            if args.no_wait:
                warm_show.given(watch, json=args.json)
                return 0
            try:
                late = _watch(fleet, watch, args)
            finally:
                if order.kind == "check":
                    fleet.withdraw(order.id)
    warm_show.ended(watch, target, json=args.json, late=late, stands=stands)
    return 0 if watch.done else 1


def _check(args: argparse.Namespace) -> None:
    """What makes no sense together; BadInputError."""
    for flag, needs in (("deep", "check"), ("reason", "pin")):
        if getattr(args, flag) and not getattr(args, needs):
            raise BadInputError(f"--{flag} says nothing without --{needs}", hint=f"add --{needs}")
    for other in ("check", "unpin", "cancel"):
        if args.pin and getattr(args, other):
            raise BadInputError(f"--pin and --{other} exclude each other", hint="give one of them")
    if args.no_wait and args.check:
        raise BadInputError("--check is a question: it waits for the answers", hint="leave --no-wait out")


def _order(args: argparse.Namespace, target: Target) -> Order:
    from floe.agent.orders import CANCEL, CHECK, UNPIN, WARM, Order  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.agent.selector import Selector  # noqa: PLC0415 - likewise

    kind = CHECK if args.check else UNPIN if args.unpin else CANCEL if args.cancel else WARM
    seconds = int(parse_seconds(args.span))
    if seconds < 1:
        raise BadInputError(f"--for {args.span}: an order that counts for no time", hint="give for example 24h")
    return Order(
        id=secrets.token_hex(6),
        kind=kind,
        what=target.name,
        digest=target.digest,
        trees=target.trees,
        content_bytes=0 if args.profile_only else target.content_bytes,
        nodes=Selector.parse(args.nodes),
        pin=args.pin,
        profile_only=args.profile_only,
        deep=args.deep,
        reason=args.reason,
        by=whoami(),
        at=datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        seconds=min(seconds, _CHECK_SECONDS) if kind == CHECK else seconds,
    )


def _check_profile(catalog: Catalog, target: Target) -> None:
    """NotFoundError when nobody recorded a start of it: then there is nothing to fetch, which is no success."""
    from floe.store.profiles import ProfileStore  # noqa: PLC0415 - lazy: keeps --help fast

    store = ProfileStore(catalog)
    for tree in target.trees:
        profile = store.of_tree(tree)
        source = store.of_source(profile.source) if profile is not None and profile.source else None
        if any(known is not None and (known.hot_frames() or known.hot_pieces()) for known in (profile, source)):
            return
    raise NotFoundError(
        f"nobody recorded a start of {target.name}, so --profile-only would fetch nothing",
        hint="start it once on a node whose profiles are on, or leave --profile-only out",
    )


@contextmanager
def _fleet(settings: Settings, catalog: Catalog, order: Order, *, wait: bool) -> Iterator[tuple[Fleet, bool]]:
    """The nodes of the index, and whether an order stands in it when this command has ended.

    Where there is but this machine, and no agent on it, this process does the agent's work: BadInputError unless it is to wait.
    """
    from floe.agent.fleet import Fleet  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.agent.heartbeat import UP, state_of  # noqa: PLC0415 - likewise

    fleet = Fleet(catalog)
    if settings.index.startswith("redis"):
        yield fleet, True
        return
    nodes = fleet.nodes()
    if any(state_of(seen, nodes) == UP for seen in nodes.values()):
        yield fleet, True
        return
    if not wait:
        raise BadInputError(
            "--no-wait: no agent runs here, so nobody would do it", hint="leave --no-wait out, or start `floe agent`"
        )
    from floe.cli.warm_here import here  # noqa: PLC0415 - lazy: keeps --help fast

    with here(settings, catalog, order) as alone:
        yield alone, False


def _give(fleet: Fleet, order: Order, *, wait: bool) -> Watch:
    """Put the order into the index, if there are nodes that it is for. NotFoundError."""
    from floe.agent.orders import CANCEL, UNPIN, WARM  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.agent.watch import Watch  # noqa: PLC0415 - likewise

    watch = Watch(order)
    nodes = fleet.nodes()
    watch.update(nodes, {}, time.monotonic())
    if not watch.nodes and wait:
        names = ", ".join(sorted(nodes)[:10])
        raise NotFoundError(
            f"no node is {order.nodes}" + (f", of {len(nodes)}: {names}" if nodes else ": no agent was heard"),
            hint="`floe nodes` shows names and labels; nodes need `floe agent` and the same index",
        )
    standing = [known for known in fleet.orders().values() if known.kind == WARM and _is_about(known, order)]
    if order.kind == CANCEL:
        if not standing:
            raise NotFoundError(
                f"there is no order for {order.what}", hint="it may have expired; --check shows who holds it"
            )
        cancels = [replace(known, kind=CANCEL) for known in standing]
        for known in cancels:
            fleet.give(known)
        watch = Watch(cancels[-1], cancels[:-1])
        watch.update(nodes, {}, time.monotonic())
        return watch
    if order.kind == UNPIN:
        # It must outlive what it takes back: an agent that starts later must not pin again.
        longest = max((known.seconds for known in standing), default=0)
        order = replace(order, seconds=max(order.seconds, longest))
        watch = Watch(order)
        watch.update(nodes, {}, time.monotonic())
    fleet.give(order)
    return watch


def _is_about(known: Order, order: Order) -> bool:
    """Whether a standing order is one of those that `order` takes back: as nodes see it, by name too, and by trees."""
    same = known.digest == order.digest or known.what == order.what
    return same or bool(known.trees and set(known.trees) <= set(order.trees))


def _watch(fleet: Fleet, watch: Watch, args: argparse.Namespace) -> bool:
    """Look at the nodes until all have ended; whether the time ran out before."""
    until = None if args.timeout is None else time.monotonic() + parse_seconds(args.timeout)
    away = False
    with warm_show.progress(watch, wanted=not args.json) as shown:
        while True:
            try:
                watch.update(fleet.nodes(), fleet.reports(), time.monotonic())
                if not watch.ended:
                    for order in watch.orders:
                        if order.id not in fleet.orders():
                            fleet.give(order)  # the index was emptied meanwhile
                away = False
            except UnavailableError as error:
                if not away:
                    output.note(f"{error}; nodes go on, and are asked again")
                away = True
            shown.update()
            if watch.ended and not away:
                return False
            if until is not None and time.monotonic() >= until:
                return True
            time.sleep(_LOOK)
