"""`floe model`: push, ls, show, profile, rm; mount is in model_mount.py, sign in signatures.py, export, verify and diff in model_content.py, copy and tag in model_names.py, history in history.py, publish in model_image.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import (
    history,
    model_content,
    model_image,
    model_mount,
    model_names,
    output,
    profiles,
    retention,
    signatures,
)
from floe.cli.context import make_spool, open_catalog
from floe.cli.names import parse_label, parse_model, parse_tagged
from floe.cli.options import (
    PUSHING,
    TRUSTING,
    Commands,
    add_command,
    add_commands,
    add_json,
    add_settings,
    add_verify,
    settings_of,
)
from floe.cli.sizes import format_size
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError, UnsupportedError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.ids import ModelRef
    from floe.store.records import Manifest, Ref


def add_parser(commands: Commands) -> None:
    """Add `floe model` and its commands."""
    below = add_commands(add_command(commands, "model", "Push, list, show, remove and mount models."))
    push = add_command(below, "push", "Store a directory as a model.", run_push)
    push.add_argument("directory", metavar="DIR", help="the model's directory")
    push.add_argument("name", metavar="NAME[:TAG]", help="what to call it; TAG defaults to latest")
    push.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="keep a remark with the model")
    add_verify(push)
    add_settings(push, *PUSHING)
    listing = add_command(below, "ls", "List models.", run_ls)
    show = add_command(below, "show", "Show one model.", run_show)
    remove = add_command(below, "rm", "Remove a model's tag; the data is left to garbage collection.", run_rm)
    for parser in (show, remove):
        parser.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    for parser in (listing, show):
        add_settings(parser, *TRUSTING)
    for parser in (push, listing, show, remove):
        add_json(parser)
    text = "the model, or NAME@DIGEST"
    profiles.add_profile(below, "a model", run_profile, name="name", metavar="NAME[:TAG]", text=text)
    model_mount.add_parser(below)
    model_content.add_parser(below)
    model_names.add_parser(below)
    history.add_parser(below)
    model_image.add_parser(below)
    retention.add_parser(below)
    signatures.add_model_commands(below)


def run_push(args: argparse.Namespace) -> int:
    """Store a directory and name it; says what the tag named before."""
    settings = settings_of(args)
    ref, labels = parse_tagged(args.name)
    given = dict(parse_label(text) for text in args.label)
    directory = Path(args.directory)
    from floe.ingest.model import push_model  # noqa: PLC0415 - lazy: keeps --help fast

    make_spool(settings)
    with (
        open_catalog(settings, signing=True) as catalog,
        output.progress(f"push {ref}", wanted=not args.json) as progress,
    ):
        result = push_model(
            catalog,
            directory,
            ref,
            spool_dir=settings.spool,
            labels={**given, **labels},
            workers=settings.workers,
            progress=progress,
            verify=args.verify,
        )
    for warning in result.warnings:
        output.note(f"warning: {warning}")
    signatures.warn_unsigned(settings, str(ref))
    moved = result.previous is not None and result.previous != result.digest
    if args.json:
        output.print_json(
            {
                **describe(ref, result.digest, result.manifest),
                "previous": result.previous,
                "new_packs": result.new_packs,
                "new_bytes": result.new_bytes,
                "total_bytes": result.total_bytes,
                "deduplicated_bytes": result.deduplicated_bytes,
                "repaired": dict(result.repaired),
                "warnings": list(result.warnings),
            }
        )
        return 0
    output.repaired(result.repaired)
    if moved:
        output.line(f"{ref} moved from {result.previous} to {result.digest}")
    else:
        output.line(f"{ref} {'is unchanged at' if result.previous else 'is'} {result.digest}")
    packs = f"{result.new_packs} new pack{'' if result.new_packs == 1 else 's'}"
    output.line(f"{format_size(result.total_bytes)} in all, {format_size(result.new_bytes)} stored anew in {packs}")
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """All models, by name and tag; one whose ref or manifest is damaged is listed as such, and fails the command at its end."""
    settings = settings_of(args)
    damaged: list[tuple[str, FloeError]] = []
    trust = signatures.trust_of(settings)
    from floe.store.signing import Statement  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings) as catalog:
        listed: list[tuple[ModelRef, str, Ref | None, Manifest | FloeError, list[dict[str, Any]]]] = [
            (
                *(ref, record.manifest, record, _manifest(catalog, record.manifest)),
                signatures.describe(trust, Statement.model(ref, record.manifest), record.signatures),
            )
            for ref, record in catalog.models(lambda key, error: damaged.append((key, error)))
        ]
    listed += [(ref, "", None, error, []) for key, error in damaged if (ref := _model_at(key))]
    listed.sort(key=lambda item: str(item[0]))
    if args.json:
        output.print_json([_listed(*item) for item in listed])
    else:
        output.table(
            ("NAME", "TAG", "DIGEST", "SIZE", "FILES", "PACKS", "UPDATED", "BY", "SIGNED"),
            (_row(*item) for item in listed),
        )
    broken = [item for item in listed if isinstance(item[3], FloeError)]
    for ref, _, _, error, _ in broken:
        output.note(f"{ref}: {error}")
    return 1 if broken else 0


def run_show(args: argparse.Namespace) -> int:
    """One model: sizes, packs, times, labels."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    trust = signatures.trust_of(settings)
    from floe.upkeep.sharing import Sharing, sharing  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings) as catalog:
        digest, manifest = catalog.resolve_model(ref)
        signed = signatures.model_signatures(catalog, trust, ref, digest, manifest.tree.digest)
        moved = _moved(None if ref.digest else catalog.model_ref(ref))
        tags = [str(other) for other, record in catalog.models() if record.manifest == digest]
        of_packs = sharing(catalog).get(digest) or Sharing(stored_bytes(manifest), 0)
    if args.json:
        found = {**describe(ref, digest, manifest), **moved, "aliases": [tag for tag in tags if tag != str(ref)]}
        sizes = {"unique_bytes": of_packs.unique, "shared_bytes": of_packs.shared}
        output.print_json({**found, **sizes, "signatures": signed})
        return 0
    output.pairs(
        (
            ("name", ref.name),
            *([("tag", ref.tag)] if ref.tag else []),
            ("digest", digest),
            ("tree", f"{manifest.tree.digest} ({format_size(manifest.tree.size)})"),
            ("content", f"{format_size(manifest.sizes.content)} in {manifest.sizes.files} files"),
            ("stored", f"{format_size(stored_bytes(manifest))} in {len(manifest.packs)} packs"),
            ("of that", f"{format_size(of_packs.unique)} its own, {format_size(of_packs.shared)} shared"),
            ("named by", ", ".join(tags) or "no tag"),
            ("created", manifest.created),
            *([("moved", " by ".join(filter(None, moved.values())))] if ref.tag else []),
            ("source", manifest.source),
            ("signed", signatures.short(signed)),
            *((f"label {key}", value) for key, value in sorted(manifest.labels.items())),
        )
    )
    output.line()
    output.table(
        ("PACK", "CONTENT", "STORED", "FRAME"),
        (
            (pack.id, format_size(pack.content_size), format_size(pack.stored_size), format_size(pack.frame_size))
            for pack in manifest.packs
        ),
    )
    return 0


def run_profile(args: argparse.Namespace) -> int:
    """What is read first of a model."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    from floe.store.profiles import ProfileStore  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings) as catalog:
        _, manifest = catalog.resolve_model(ref)
        store = ProfileStore(catalog)
        cleared = args.clear and store.clear(manifest.tree.digest)
        found = {"ref": str(ref), **profiles.describe(store, manifest.tree.digest, manifest.packs)}
    if args.json:
        output.print_json({**found, "cleared": cleared})
    elif args.clear:
        output.line(f"{'cleared the profile' if cleared else 'there was no profile'} of {ref}")
    else:
        profiles.show(found)
    return 0


def run_rm(args: argparse.Namespace) -> int:
    """Remove a tag, or with NAME@DIGEST every tag of NAME that names that digest."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    with open_catalog(settings) as catalog:
        digest = catalog.remove_model(ref)
    if args.json:
        output.print_json({"ref": str(ref), "manifest": digest or None})
    else:
        was = f", which was {digest}" if digest else ", whose record could not be read"
        output.line(f"removed {ref}" + ("" if ref.digest else was))
    return 0


def describe(ref: ModelRef, digest: str, manifest: Manifest) -> dict[str, Any]:
    """A model as --json shows it; sizes in bytes."""
    return {
        "ref": str(ref),
        "name": ref.name,
        "tag": ref.tag,
        "manifest": digest,
        "tree": manifest.tree.digest,
        "tree_bytes": manifest.tree.size,
        "files": manifest.sizes.files,
        "inodes": manifest.sizes.inodes,
        "content_bytes": manifest.sizes.content,
        "stored_bytes": stored_bytes(manifest),
        "packs": [
            {"id": p.id, "content_bytes": p.content_size, "stored_bytes": p.stored_size, "frame_bytes": p.frame_size}
            for p in manifest.packs
        ],
        "created": manifest.created,
        "source": manifest.source,
        "labels": dict(sorted(manifest.labels.items())),
    }


def stored_bytes(manifest: Manifest) -> int:
    """Bytes of the packs that the manifest names, shared ones included."""
    return sum(pack.stored_size for pack in manifest.packs)


def _moved(record: Ref | None) -> dict[str, str]:
    """When a tag was moved to where it is, and by whom, as that machine said."""
    return {"updated": "" if record is None else record.updated, "by": "" if record is None else record.by}


def _model_at(key: str) -> ModelRef | None:
    """Whose ref is at `key`; None: nobody's, and then nobody misses it."""
    from floe.store.layout import parse_model_ref_key  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        return parse_model_ref_key(key)
    except BadInputError:
        return None


def _manifest(catalog: Catalog, digest: str) -> Manifest | FloeError:
    try:
        return catalog.get_manifest(digest)
    except (NotFoundError, DamagedError, UnsupportedError) as error:
        return error


def _listed(
    ref: ModelRef, digest: str, record: Ref | None, manifest: Manifest | FloeError, signed: list[dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(manifest, FloeError):
        named = {"ref": str(ref), "name": ref.name, "tag": ref.tag, "manifest": digest or None}
        return {**named, "error": str(manifest)}
    return {**describe(ref, digest, manifest), **_moved(record), "signatures": signed}


def _row(
    ref: ModelRef, digest: str, record: Ref | None, manifest: Manifest | FloeError, signed: list[dict[str, Any]]
) -> tuple[str, ...]:
    start, end = (ref.name, str(ref.tag), digest[:12]), (*_moved(record).values(), signatures.short(signed))
    if isinstance(manifest, FloeError):
        return (*start, "damaged", "", "", *end)
    sizes = manifest.sizes
    return (*start, format_size(sizes.content), str(sizes.files), str(len(manifest.packs)), *end)
