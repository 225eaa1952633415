"""`floe model copy` and `tag`: a model in another store, or under another name."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace

from floe.cli import output, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.names import parse_model, parse_tagged
from floe.cli.options import PUSHING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import load
from floe.cli.sizes import format_size
from floe.store.errors import BadInputError


def add_parser(below: Commands) -> None:
    """Add both commands."""
    copy = add_command(below, "copy", "Copy a model into another store.", run_copy)
    copy.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    copy.add_argument("target", metavar="URL", help="the other store, as for --store")
    copy.add_argument("--as", dest="new", metavar="NAME[:TAG]", help="what it is called there (as here)")
    tag = add_command(below, "tag", "Give a model one more name, or move a tag to it.", run_tag)
    tag.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    tag.add_argument("new", metavar="NEW[:TAG]", help="its other name")
    for parser in (copy, tag):
        add_settings(parser, *PUSHING)
        add_json(parser)


def run_copy(args: argparse.Namespace) -> int:
    """Copy what is not there yet, verified, then name it."""
    return _run(args, load({"store": args.target}, {}, config="").store)


def run_tag(args: argparse.Namespace) -> int:
    """Name it, after a look whether all of it is there."""
    return _run(args, None)


def _run(args: argparse.Namespace, url: str | None) -> int:
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    if args.new is None and ref.digest:
        raise BadInputError(f"{ref} has no tag to keep", hint="add --as NAME:TAG")
    name = ref if args.new is None else parse_tagged(args.new)[0]
    from floe.client.copy import copy_model  # noqa: PLC0415 - lazy: keeps --help fast

    make_spool(settings)
    with ExitStack() as stack:
        source = stack.enter_context(open_catalog(settings, trusting=True, signing=True))
        target = source
        if url is not None:
            # The index knows this machine's own store; the other's is read from its bucket.
            other = replace(settings, store=url, index="none")
            target = stack.enter_context(open_catalog(other, signing=True))
        progress = stack.enter_context(output.progress(f"copy {ref}", wanted=not args.json and url is not None))
        done = copy_model(source, target, ref, name, spool=settings.spool, progress=progress)
        where = target.store.url
    signatures.warn_unsigned(settings, str(name))
    if args.json:
        output.print_json(
            {
                "ref": str(name),
                "manifest": done.digest,
                "previous": done.previous,
                "store": where,
                "new_packs": done.new_packs,
                "new_bytes": done.new_bytes,
            }
        )
        return 0
    moved = f", moved from {done.previous}" if done.previous not in (None, done.digest) else ""
    output.line(f"{name} in {where} is {done.digest}{moved}")
    if url is not None:
        output.line(f"{format_size(done.new_bytes)} copied in {done.new_packs} packs")
    return 0
