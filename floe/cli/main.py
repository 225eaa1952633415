"""The `floe` command: parses the command line and runs the noun's module. Keeps its own imports light."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from floe.cli import (
    agent,
    bench,
    bento,
    completion,
    containerd,
    csi,
    debug,
    doctor,
    fsck,
    gc,
    image,
    indexer,
    key,
    log_level,
    model,
    nodes,
    packfs,
    rebuild_index,
    seed,
    snapshotter,
    status,
    store,
    top,
    trace,
    ui,
    umount,
    version,
    warm,
)
from floe.cli.exit import USAGE, guard
from floe.cli.options import Parser, add_commands, add_shared

_NOUNS = (
    *(model, umount, image, indexer, bento, key, store, gc, fsck, rebuild_index),
    *(warm, nodes),
    *(
        status,
        top,
        ui,
        trace,
        debug,
        log_level,
        bench,
        doctor,
        containerd,
        packfs,
        snapshotter,
        csi,
        agent,
        seed,
        version,
        completion,
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; also what shell completion is made from."""
    parser = Parser(
        prog="floe",
        description="Containers and models that start before they have arrived.",
        epilog="Exit status: 0 done, 1 failed, 2 used wrongly, 3 done and damage or warnings found. Settings come from the file, then FLOE_* variables, "
        "then flags; later wins. A setting's flag may stand before or after the command that goes by it.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    add_shared(parser)
    commands = add_commands(parser, "command")
    for noun in _NOUNS:
        noun.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit code."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    deepest: argparse.ArgumentParser = getattr(args, "parser", parser)
    if unknown:  # argparse itself would show the usage of `floe`, whichever command they follow
        deepest.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.version:
        return guard(lambda: version.run(argparse.Namespace(json=False)))
    run = getattr(args, "run", None)
    if run is None:
        deepest.print_help(sys.stderr)
        return USAGE
    return guard(lambda: run(args))


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main())
