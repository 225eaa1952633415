"""`floe model export`, `verify` and `diff`: what a model holds."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.exit import DAMAGE, DONE
from floe.cli.names import parse_model
from floe.cli.options import READING, TRUSTING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.sizes import Size, format_size
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.erofs_inodes import Inodes
    from floe.store.records import Manifest
    from floe.store.treediff import Difference

_SHOWN = 8


def add_parser(below: Commands) -> None:
    """Add the three commands."""
    export = add_command(below, "export", "Write a model to a directory, verified.", run_export)
    export.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    export.add_argument("directory", metavar="DIR", help="a new directory, or an empty one")
    add_settings(export, "workers", *READING, *TRUSTING)
    verify = add_command(below, "verify", "Read all content of a model in the store, and verify it.", run_verify)
    verify.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    verify.add_argument("--rate", metavar="SIZE", help="read at most so many bytes a second")
    add_settings(verify, "workers", *TRUSTING)
    diff = add_command(below, "diff", "Show how two models differ, and what they share.", run_diff)
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help="a model, NAME[:TAG] or NAME@DIGEST")
    add_settings(diff, *TRUSTING)
    for parser in (export, verify, diff):
        add_json(parser)


def run_export(args: argparse.Namespace) -> int:
    """Write all of it, or nothing."""
    settings = settings_of(args)
    from floe.client.store import Store  # noqa: PLC0415 - lazy: keeps --help fast

    with Store(settings) as store, output.progress(f"export {args.name}", wanted=not args.json) as progress:
        model = store.model(args.name)
        done = model.export(Path(args.directory), progress=progress)
    for warning in done.warnings:
        output.note(f"warning: {warning}")
    if args.json:
        found = {"ref": str(model.ref), "manifest": model.digest, "directory": str(done.directory)}
        output.print_json({**found, "files": done.files, "content_bytes": done.content, "warnings": done.warnings})
    else:
        output.line(f"{model.ref} ({model.digest[:12]}) is in {done.directory}: {format_size(done.content)}")
    return DONE


def run_verify(args: argparse.Namespace) -> int:
    """0: whole and sound; 3: damage was found."""
    rate = None if args.rate is None else Size.parse(args.rate, percent=False).of(0)
    if rate == 0:
        raise BadInputError("--rate 0 would never end", hint="leave it out for no bound")
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    from floe.upkeep.modelcheck import check_model  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings, trusting=True) as catalog:
        digest, manifest = catalog.resolve_model(ref)
        with output.progress(f"verify {ref}", wanted=not args.json) as progress:
            found = check_model(catalog, manifest, workers=settings.workers, rate=rate, progress=progress)
    if args.json:
        output.print_json({"ref": str(ref), "manifest": digest, **asdict(found), "damaged": found.damaged})
    elif not found.damaged:
        output.line(f"{ref} ({digest[:12]}) is whole: {found.frames} frames, {format_size(found.read_bytes)} read")
    else:
        if found.tree_fault:
            output.line(found.tree_fault)
        for fault in found.faults:
            output.line(f"pack {fault.pack}: {fault.detail}")
            if fault.frames:
                more = "..." if len(fault.frames) > _SHOWN else ""
                output.line(f"  frames: {', '.join(map(str, fault.frames[:_SHOWN]))}{more}")
        output.note(f"{ref} is damaged in the store: push it again with --verify, or run `floe fsck --deep --repair`")
    return DAMAGE if found.damaged else DONE


def run_diff(args: argparse.Namespace) -> int:
    """What was added, removed and changed from A to B; 0 whether they differ or not."""
    settings = settings_of(args)
    refs = [parse_model(name)[0] for name in (args.a, args.b)]
    from floe.store.treediff import compare  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings, trusting=True) as catalog:
        models = [catalog.resolve_model(ref) for ref in refs]
        before, after = (_tree(catalog, manifest) for _, manifest in models)
        found = compare(before, after, lambda pack_id: _digests(catalog, pack_id))
    if args.json:
        output.print_json(
            {
                "a": {"ref": str(refs[0]), "manifest": models[0][0]},
                "b": {"ref": str(refs[1]), "manifest": models[1][0]},
                "changes": [
                    {
                        "path": os.fsdecode(change.path),
                        "change": change.change,
                        "a_bytes": change.before,
                        "b_bytes": change.after,
                    }
                    for change in found.changes
                ],
                "same": found.same,
                "shared_bytes": found.shared,
                "only_a_bytes": found.only_before,
                "only_b_bytes": found.only_after,
            }
        )
    else:
        _print(found, *map(str, refs))
    return DONE


def _print(found: Difference, a: str, b: str) -> None:
    if found.changes:
        output.table(
            ("CHANGE", "PATH", "SIZE BEFORE", "AFTER"),
            (
                (
                    change.change,
                    os.fsdecode(change.path),
                    "" if change.before is None else format_size(change.before),
                    "" if change.after is None else format_size(change.after),
                )
                for change in found.changes
            ),
        )
    else:
        output.line(f"{a} and {b} hold the same")
    output.line(
        f"{found.same} paths are the same; of the content {format_size(found.shared)} is shared, "
        f"{format_size(found.only_before)} only in {a}, {format_size(found.only_after)} only in {b}"
    )


def _tree(catalog: Catalog, manifest: Manifest) -> Inodes:
    from floe.store import layout  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.erofs_inodes import Inodes  # noqa: PLC0415 - likewise
    from floe.store.treeobject import decode_tree  # noqa: PLC0415 - likewise

    digest = manifest.tree.digest
    return Inodes(decode_tree(catalog.store.get(layout.tree_key(digest)), digest), f"tree {digest}")


def _digests(catalog: Catalog, pack_id: str) -> dict[int, bytes]:
    from floe.store import layout  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.packindex import PackIndex, decode_chunk_table  # noqa: PLC0415 - likewise

    index = PackIndex.decode(catalog.store.get(layout.pack_index_key(pack_id)), pack_id)
    chunks = decode_chunk_table(catalog.store.get(layout.chunk_table_key(pack_id)), index, pack_id)
    return {chunk.block: chunk.digest for chunk in chunks}
