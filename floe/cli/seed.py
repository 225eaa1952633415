"""`floe seed`: gives what this node unpacked to the store, until it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from floe.cli import output, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.options import PUSHING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import BadInputError
from floe.store.progress import Adding

if TYPE_CHECKING:
    from floe.seeding.seeder import Seeder

_log = logging.getLogger(__name__)
SETTINGS = ("seed", "seed_rate", "image_policy", "containerd_socket", "address")


def add_parser(commands: Commands) -> None:
    """Add `floe seed`."""
    text = "Give images that this node had to unpack to the store, in the background."
    parser = add_command(commands, "seed", text, run)
    parser.add_argument("--once", action="store_true", help="look once at what was unpacked, seed that, and end")
    add_settings(parser, *SETTINGS, *PUSHING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Seed until SIGTERM; with --once a single time, at the ordinary priority of this process."""
    if args.json and not args.once:
        raise BadInputError("--json is for a single look", hint="give --once")
    settings = settings_of(args, daemon=not args.once)
    if settings.seed == "off":
        raise BadInputError("seeding is off", hint='set seed = "label" or "all"')
    from floe.store.process import sd_notify  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.stopsignal import stop_signal  # noqa: PLC0415 - likewise

    if not args.once:
        gently()
    with opened(settings) as seeder:
        if args.once:
            return _once(seeder, as_json=args.json)
        stop = stop_signal()
        sd_notify("READY=1")
        seeder.run(stop)
        sd_notify("STOPPING=1")
    return 0


def gently() -> None:
    """All of this process comes after others. Before it asks a store anything: threads of libraries begin then, and stay as they began."""
    from floe.seeding.gently import step_back  # noqa: PLC0415 - lazy: keeps --help fast

    for problem in step_back():
        _log.warning("%s", problem)


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Seeder]:
    """What seeds this node's images; the store, the index and containerd are closed afterwards. BadInputError: no queue."""
    from floe.seeding.containerd import ContainerdNode  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.seeding.seeder import SeedConfig, Seeder  # noqa: PLC0415 - likewise
    from floe.store.index.jobs import open_queue  # noqa: PLC0415 - likewise

    make_spool(settings)
    signatures.warn_unsigned(settings, "what is seeded")
    config = SeedConfig(settings.seed, settings.spool, settings.image_policy.rules, settings.seed_rate)
    with open_catalog(settings, signing=True) as catalog:
        url = None if settings.index == "none" else settings.index
        queue = open_queue(url, catalog.check_store().uuid)
        node = ContainerdNode(settings.containerd_socket, settings.socket)
        with contextlib.closing(queue), contextlib.closing(node):
            yield Seeder(catalog, queue, node, config)


def _once(seeder: Seeder, *, as_json: bool) -> int:
    with output.progress("seed", wanted=not as_json) as progress:
        seeder.shown = Adding(progress)
        found = seeder.round(threading.Event())
    if as_json:
        output.print_json(found)
        return 0
    output.table(("IMAGE", "BECAME"), ((name, outcome) for outcome, names in found.items() for name in names))
    return 0
