"""`floe image`: index, ls, show, profile and rm; attach, detach and weights are in attachments.py, sign in signatures.py."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from floe.cli import attachments, indexer, output, profiles, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.options import (
    PUSHING,
    TRUSTING,
    Commands,
    add_command,
    add_commands,
    add_json,
    add_plain_http,
    add_platform,
    add_settings,
    add_verify,
    settings_of,
)
from floe.cli.settings import Settings
from floe.cli.sizes import format_size
from floe.store.errors import BadInputError, DamagedError, NotFoundError
from floe.store.ids import is_oci_digest

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.errors import FloeError
    from floe.store.records import ImageRecord, PackEntry

_SOURCES = "HOST/NAME[:TAG|@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME:TAG]"


def add_parser(commands: Commands) -> None:
    """Add `floe image` and its commands."""
    below = add_commands(
        add_command(commands, "image", "Index, list, show and remove images; attach and detach models.")
    )
    index = add_command(below, "index", "Make an image's layers mountable lazily.", run_index)
    index.add_argument("image", metavar="REF", help=_SOURCES)
    layout = index.add_mutually_exclusive_group()
    text = "also lay out anew what starts read of layers that are stored already"
    layout.add_argument("--profile", dest="lay_out", action="store_const", const="all", default="new", help=text)
    text = "store layers in their own order, whatever starts read of earlier versions"
    layout.add_argument("--no-profile", dest="lay_out", action="store_const", const="none", help=text)
    listing = add_command(below, "ls", "List indexed images.", run_ls)
    show = add_command(below, "show", "Show one indexed image.", run_show)
    remove = add_command(below, "rm", "Remove an image's record; layers are shared and left to gc.", run_rm)
    for parser in (show, remove):
        parser.add_argument("image", metavar="REF", help="a name under which it was indexed, or its manifest's digest")
    text = "a name under which it was indexed, or its manifest's digest"
    profiles.add_profile(below, "an image's layers", run_profile, name="image", metavar="REF", text=text)
    signatures.add_image_command(below, text)
    attachments.add_parser(below, _SOURCES)
    add_platform(index)
    add_settings(index, "registry_config")
    add_settings(show, *TRUSTING)
    add_plain_http(index)
    text = "let an indexer do it: put the image into the queue of `floe indexer`, and end"
    index.add_argument("--queue", action="store_true", help=text)
    add_verify(index)
    add_settings(index, *PUSHING)
    for parser in (index, listing, show, remove):
        add_json(parser)


def run_index(args: argparse.Namespace) -> int:
    """Index an image: each layer not yet known is stored, then the image is recorded."""
    settings = settings_of(args)
    if args.queue:
        return _ask_indexers(args, settings)
    from floe.ingest.oci.image import index_image  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.ingest.oci.taken import TAKEN  # noqa: PLC0415 - likewise

    make_spool(settings)
    with (
        open_catalog(settings, signing=True) as catalog,
        output.progress(f"index {args.image}", wanted=not args.json) as progress,
    ):
        result = index_image(
            catalog,
            args.image,
            platform=args.platform,
            plain_http=args.plain_http,
            registry_config=settings.registry_config,
            spool_dir=settings.spool,
            workers=settings.workers,
            progress=progress,
            profile=args.lay_out,
            verify=args.verify,
        )
        shown = describe(catalog, result.record)
    signatures.warn_unsigned(settings, args.image)
    if args.json:
        new = {"new_layers": result.new_layers, "new_packs": result.new_packs, "new_bytes": result.new_bytes}
        hot: dict[str, Any] = {
            "laid_out_layers": result.laid_out_layers,
            "hot_bytes": result.hot_bytes,
            "copied_bytes": result.copied_bytes,
        }
        hot["repaired"] = dict(result.repaired)
        output.print_json({**shown, **new, **hot, "registry": TAKEN.counted(), "warnings": list(result.warnings)})
        return 0
    for warning in result.warnings:
        output.note(f"warning: {warning}")
    output.repaired(result.repaired)
    output.line(f"{args.image} is {result.record.manifest_digest} ({result.record.platform})")
    output.line(
        f"{len(shown['layers'])} layers, {result.new_layers} of them new; "
        f"{format_size(result.new_bytes)} stored anew in {result.new_packs} packs"
    )
    if result.hot_bytes:
        output.line(
            f"{format_size(result.hot_bytes)} that starts read lie together now, {format_size(result.copied_bytes)} of it "
            f"stored once more; {result.laid_out_layers} stored layers were laid out anew"
        )
    return 0


def _ask_indexers(args: argparse.Namespace, settings: Settings) -> int:
    if args.verify:
        raise BadInputError("--verify is not for indexers", hint="leave out --queue")
    new = indexer.ask(settings, args.image, args.platform, args.lay_out, plain_http=args.plain_http)
    if args.json:
        output.print_json({"queued": new})
    else:
        output.line(f"{args.image} waits for an indexer{'' if new else ' already'}")
    return 0


def run_ls(args: argparse.Namespace) -> int:
    """All image records; one that is damaged is listed as such, and fails the command at its end."""
    settings = settings_of(args)
    damaged: dict[str, FloeError] = {}
    with open_catalog(settings) as catalog:
        records = list(catalog.images(lambda key, error: damaged.update({f"sha256:{key.rpartition('/')[2]}": error})))
    for digest, error in damaged.items():
        output.note(f"{digest}: {error}")
    code = 1 if damaged else 0
    if args.json:
        broken = [{"digest": digest, "error": str(error)} for digest, error in damaged.items()]
        output.print_json([*map(_summary, records), *broken])
        return code
    output.table(
        ("NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "INDEXED"),
        (
            (
                ", ".join(record.names) or "-",
                record.manifest_digest.removeprefix("sha256:")[:12],
                record.platform,
                str(len(record.diff_ids)),
                format_size(record.size),
                record.indexed,
            )
            for record in records
        ),
    )
    return code


def run_show(args: argparse.Namespace) -> int:
    """One image: names, layers, and what of them is stored."""
    settings = settings_of(args)
    trust = signatures.trust_of(settings)
    with open_catalog(settings) as catalog:
        shown = describe(catalog, find(catalog, args.image))
        for layer in shown["layers"]:
            layer["signatures"] = signatures.layer_signatures(catalog, trust, layer["diff_id"])
    if args.json:
        output.print_json(shown)
        return 0
    models = [f"{model['name']} at {model['path']}" for model in shown["models"]]
    output.pairs(
        (
            *(("name", name) for name in shown["names"]),
            ("digest", shown["digest"]),
            ("platform", shown["platform"]),
            ("pull size", format_size(shown["size_bytes"])),
            ("indexed", shown["indexed"]),
            *(("model", text) for text in models),
        )
    )
    output.line()
    output.table(
        ("DIFF ID", "CONTENT", "FILES", "PACKS", "SIGNED", "STATE"),
        (
            (
                layer["diff_id"],
                *(format_size(layer["content_bytes"]), str(layer["files"]), str(layer["packs"])),
                signatures.short(layer["signatures"]),
                "indexed",
            )
            if layer["indexed"]
            else (layer["diff_id"], "", "", "", "", "model" if layer["model"] else "not indexed")
            for layer in shown["layers"]
        ),
    )
    return 0


def run_profile(args: argparse.Namespace) -> int:
    """What is read first of an image's layers, and of the models attached to it."""
    settings = settings_of(args)
    from floe.store.profiles import ProfileStore  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings) as catalog:
        record = find(catalog, args.image)
        store = ProfileStore(catalog)
        trees = trees_of(catalog, record)
        cleared = [store.clear(tree) for _, tree, _ in trees] if args.clear else []
        found = [{"layer": layer, **profiles.describe(store, tree, packs)} for layer, tree, packs in trees]
    if args.json:
        output.print_json({**_summary(record), "layers": found, "cleared": any(cleared)})
    elif args.clear:
        output.line(f"{'cleared the profiles' if any(cleared) else 'there were no profiles'} of {args.image}")
    else:
        output.table(
            ("LAYER", "STARTS", "FRAMES", "SIZE", "FILES", "VERSIONS"),
            (
                (
                    layer["layer"].removeprefix("sha256:")[:24],
                    str(layer["starts"]),
                    str(layer["frames"]),
                    format_size(layer["frame_bytes"]),
                    str(len(layer["files"])),
                    f"{layer['source'] or '-'} ({layer['source_starts']})",
                )
                for layer in found
            ),
        )
    return 0


def trees_of(catalog: Catalog, record: ImageRecord) -> list[tuple[str, str, tuple[PackEntry, ...]]]:
    """(diff id or model, tree, packs) of all that a start of the image mounts, bottom first."""
    found = []
    for diff_id in dict.fromkeys(record.diff_ids):
        layer = catalog.layer(diff_id)
        if layer is not None:
            found.append((diff_id, layer[1].tree.digest, layer[1].packs))
    attachment = catalog.attachment(record.manifest_digest)
    for model in attachment.models if attachment else ():
        packs = catalog.get_manifest(model["manifest"]).packs
        found.append((model["name"], model["tree"], packs))
    return found


def run_rm(args: argparse.Namespace) -> int:
    """Remove an image's record, and that of its models; an attached image that is not indexed goes by its digest."""
    settings = settings_of(args)
    with open_catalog(settings) as catalog:
        record: ImageRecord | None = None
        try:
            record = find(catalog, args.image)
            digest = record.manifest_digest
        except (NotFoundError, DamagedError):
            digest = args.image.rpartition("@")[2]
            if not is_oci_digest(digest):
                raise
        catalog.remove_image(digest)
    if args.json:
        output.print_json(_summary(record) if record else {"digest": digest, "names": []})
    else:
        names = ", ".join(record.names) if record else ""
        output.line(f"removed the record of {names or args.image}, {digest}")
    return 0


def find(catalog: Catalog, text: str) -> ImageRecord:
    """The record of the image called `text`, written out or short (`app` for `docker.io/library/app:latest`)."""
    from floe.ingest.oci.references import parse_image_ref  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        return catalog.find_image(text)
    except NotFoundError:
        with contextlib.suppress(BadInputError):
            full = str(parse_image_ref(text))
            if full != text:
                return catalog.find_image(full)
        raise


def describe(catalog: Catalog, record: ImageRecord) -> dict[str, Any]:
    """An image as --json shows it; sizes in bytes, layers bottom first. An attached model is a layer."""
    attachment = catalog.attachment(record.manifest_digest)
    models = list(attachment.models) if attachment else []
    layers: list[dict[str, Any]] = []
    known = [catalog.layer(diff_id) for diff_id in record.diff_ids]
    missing = [number for number, found in enumerate(known) if found is None]
    # Stubs are not stored; what was built on top of them, or is not stored for another reason, leaves them uncertain.
    stubs = missing if len(missing) == len(models) else range(len(known) - len(models), len(known))
    model_of = dict(zip(stubs, models, strict=False))
    for number, (diff_id, chain_id) in enumerate(zip(record.diff_ids, record.chain_ids, strict=True)):
        found = known[number]
        layer: dict[str, Any] = {"diff_id": diff_id, "chain_id": chain_id, "indexed": found is not None}
        layer["model"] = model_of[number]["name"] if found is None and number in model_of else None
        if found is not None:
            digest, manifest = found
            layer |= {
                "manifest": digest,
                "tree": manifest.tree.digest,
                "content_bytes": manifest.sizes.content,
                "files": manifest.sizes.files,
                "packs": len(manifest.packs),
            }
        layers.append(layer)
    return {**_summary(record), "layers": layers, "models": models}


def _summary(record: ImageRecord) -> dict[str, Any]:
    return {
        "digest": record.manifest_digest,
        "names": list(record.names),
        "platform": record.platform,
        "size_bytes": record.size,
        "indexed": record.indexed,
        "diff_ids": list(record.diff_ids),
    }
