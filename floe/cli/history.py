"""`floe model history`: what a model's tags named, when, and who moved them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.names import parse_model
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.store.errors import BadInputError, FloeError, NotFoundError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.ids import ModelRef
    from floe.store.records import Move, Ref


@dataclass(frozen=True)
class _Line:
    """A tag named `move.manifest` until `until`, "" for now; `stored`: whether that is in the store still."""

    ref: ModelRef
    move: Move
    until: str
    stored: bool


def add_parser(below: Commands) -> None:
    """Add `floe model history`."""
    text = "Show what a model's tags named, since when, and who moved them there."
    parser = add_command(below, "history", text, run)
    parser.add_argument("name", metavar="NAME[:TAG]", help="the model, without TAG with all its tags")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """The moves, latest first; a tag that cannot be read fails the command at its end."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    if ref.digest is not None:
        raise BadInputError(f"{ref} never moves", hint="give NAME or NAME:TAG; `floe model show` says when it was made")
    damaged: list[tuple[str, FloeError]] = []
    with open_catalog(settings) as catalog:
        if ":" in args.name:
            tags = [(ref, catalog.model_ref(ref))]
        else:
            tags = catalog.tags_of(ref.name, lambda key, error: damaged.append((key, error)))
            if not tags and not damaged:
                raise NotFoundError(f"no model {ref.name} in {catalog.store.url}", hint="`floe model ls` lists them")
        lines = _lines(catalog, tags)
    if args.json:
        output.print_json([_json(line) for line in lines])
    else:
        output.table(("TAG", "DIGEST", "SINCE", "UNTIL", "BY", "STORED"), map(_row, lines))
    for key, error in damaged:
        output.note(f"{key}: {error}")
    return 1 if damaged else 0


def _lines(catalog: Catalog, tags: list[tuple[ModelRef, Ref]]) -> list[_Line]:
    digests = {move.manifest for _, record in tags for move in record.moves}
    stored = {digest: catalog.has_manifest(digest) for digest in sorted(digests)}
    lines = []
    for ref, record in tags:
        until = ""
        for move in record.moves:
            lines.append(_Line(ref, move, until, stored[move.manifest]))
            until = move.updated
    return sorted(lines, key=lambda line: line.move.updated, reverse=True)


def _json(line: _Line) -> dict[str, Any]:
    move = line.move
    named = {"ref": str(line.ref), "name": line.ref.name, "tag": line.ref.tag, "manifest": move.manifest}
    return {**named, "since": move.updated, "until": line.until or None, "by": move.by, "stored": line.stored}


def _row(line: _Line) -> tuple[str, ...]:
    move = line.move
    until = line.until or "now"
    return str(line.ref.tag), move.manifest, move.updated, until, move.by, "yes" if line.stored else "no"
