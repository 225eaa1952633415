"""`floe rebuild-index`: the index from the bucket alone."""

from __future__ import annotations

import argparse

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.options import Commands, add_command, add_json, settings_of


def add_parser(commands: Commands) -> None:
    """Add `floe rebuild-index`."""
    text = "Fill the index from the store alone, whatever it held before."
    add_json(add_command(commands, "rebuild-index", text, run))


def run(args: argparse.Namespace) -> int:
    """Read all chunk tables and refs. 0 also when packs were left out: what is wrong with them is for fsck to judge."""
    from floe.upkeep.rebuild import rebuild_index  # noqa: PLC0415 - lazy: keeps --help fast

    settings = settings_of(args)
    with open_catalog(settings) as catalog, output.progress("index", wanted=not args.json) as progress:
        done = rebuild_index(catalog, progress)
        url = catalog.index.url
    if args.json:
        found = {"index": url, "packs": done.packs, "chunks": done.chunks, "refs": done.refs, "gone_packs": done.gone}
        output.print_json({**found, "left_out": done.left_out})
        return 0
    output.line(f"{url} knows {done.chunks} chunks in {done.packs} packs, and {done.refs} refs")
    if done.gone:
        output.line(f"it forgot {done.gone} packs that the store does not have")
    for what, reason in done.left_out.items():
        output.note(f"{what} is left out: {reason}")
    return 0
