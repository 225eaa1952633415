"""`floe image attach`, `detach` and `weights`: models in images, and out of them again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from floe.cli import output, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.names import parse_model, parse_placed_model, parse_tagged
from floe.cli.options import (
    PUSHING,
    SIGNING,
    Commands,
    add_command,
    add_json,
    add_plain_http,
    add_platform,
    add_settings,
    settings_of,
)
from floe.cli.sizes import Size, format_size
from floe.store.errors import BadInputError

_LARGE = "64MiB"

if TYPE_CHECKING:
    from floe.store.ids import ModelRef
    from floe.store.stub import Marker


def add_parser(below: Commands, sources: str) -> None:
    """Add `attach` and `detach` below `floe image`; `sources` says what an image to read may be."""
    attach = add_command(below, "attach", "Make an image that also carries models, as stub layers.", run_attach)
    detach = add_command(
        below, "detach", "Make an image without models that are attached to it, or lie in its layers.", run_detach
    )
    for parser in (attach, detach):
        parser.add_argument("source", metavar="SOURCE", help=sources)
        text = "where the new image goes: HOST/NAME:TAG or oci:DIR[:TAG]"
        parser.add_argument("target", metavar="TARGET", help=text)
    attach.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME[:TAG]=PATH",
        help="a model and where a container sees it; may be given several times",
    )
    which = detach.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model",
        action="append",
        metavar="NAME[:TAG]|PATH",
        help="a model that SOURCE carries, or the path at which it has one; may be given several times",
    )
    which.add_argument("--all", action="store_true", help="all models that SOURCE carries")
    which.add_argument(
        "--directory",
        action="append",
        metavar="PATH=NAME[:TAG]",
        help="make a directory of SOURCE's own layers a model, and attach it there; may be given several times",
    )
    for parser in (attach, detach):
        add_platform(parser)
        add_settings(parser, "registry_config")
        add_plain_http(parser, "source", "target")
        add_json(parser)
    add_settings(attach, *SIGNING)
    add_settings(detach, *PUSHING)
    weights = add_command(below, "weights", "Find the directories of an image that hold large files.", run_weights)
    weights.add_argument("source", metavar="SOURCE", help=sources)
    text = f"what counts as large ({_LARGE})"
    weights.add_argument("--min-size", metavar="SIZE", default=_LARGE, help=text)
    add_platform(weights)
    add_plain_http(weights)
    add_settings(weights, "registry_config")
    add_json(weights)


def run_attach(args: argparse.Namespace) -> int:
    """Publish TARGET: SOURCE with a stub layer for each model."""
    settings = settings_of(args)
    models = [parse_placed_model(text) for text in args.model]
    paths = [path for _, path in models]
    if len(set(paths)) != len(paths):
        raise BadInputError("two models are given the same path", hint="give each --model a path of its own")
    from floe.ingest.oci.attach import attach  # noqa: PLC0415 - lazy: keeps --help fast

    with (
        open_catalog(settings, trusting=True, signing=True) as catalog,
        output.progress(f"attach {args.target}", wanted=not args.json) as progress,
    ):
        result = attach(
            catalog,
            args.source,
            args.target,
            models,
            platform=args.platform,
            plain_http=args.plain_http or args.source_plain_http,
            target_plain_http=args.plain_http or args.target_plain_http,
            registry_config=settings.registry_config,
            progress=progress,
        )
    _warn(result.warnings)
    signatures.warn_unsigned(settings, result.target)
    placed = [{"name": str(ref), "path": path} for ref, path in models]
    if args.json:
        copied: dict[str, Any] = {"digest": result.digest, "copied_bytes": result.copied_bytes, "models": placed}
        copied["warnings"] = list(result.warnings)
        output.print_json({"source": args.source, "target": result.target, **copied})
        return 0
    output.line(f"{result.target} is {result.digest}, {format_size(result.copied_bytes)} copied")
    for model in placed:
        output.line(f"{model['name']} at {model['path']}")
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Publish TARGET: SOURCE without the stub layers of the models that are named."""
    if args.directory:
        return _run_extract(args)
    settings = settings_of(args)
    wanted = None if args.all else [_meant(text) for text in args.model]
    from floe.ingest.oci.detach import detach  # noqa: PLC0415 - lazy: keeps --help fast

    with (
        open_catalog(settings) as catalog,
        output.progress(f"detach {args.target}", wanted=not args.json) as progress,
    ):
        result = detach(
            catalog,
            args.source,
            args.target,
            wanted,
            platform=args.platform,
            plain_http=args.plain_http or args.source_plain_http,
            target_plain_http=args.plain_http or args.target_plain_http,
            registry_config=settings.registry_config,
            progress=progress,
        )
    _warn(result.warnings)
    if args.json:
        models = {"detached": list(map(_shown, result.detached)), "models": list(map(_shown, result.left))}
        copied = {"digest": result.digest, "copied_bytes": result.copied_bytes, "warnings": list(result.warnings)}
        output.print_json({"source": args.source, "target": result.target, **copied, **models})
        return 0
    output.line(f"{result.target} is {result.digest}, {format_size(result.copied_bytes)} copied")
    for word, markers in (("without", result.detached), ("still with", result.left)):
        for marker in markers:
            output.line(f"{word} {marker.model} at {marker.path}")
    return 0


def run_weights(args: argparse.Namespace) -> int:
    """List the directories that `detach --directory` is for."""
    least = Size.parse(args.min_size, percent=False).of(0)
    settings = settings_of(args)
    from floe.ingest.oci.weights import find_weights  # noqa: PLC0415 - lazy: keeps --help fast

    with (
        open_catalog(settings) as catalog,
        output.progress(f"read {args.source}", wanted=not args.json) as progress,
    ):
        found = find_weights(
            catalog,
            args.source,
            least,
            platform=args.platform,
            plain_http=args.plain_http,
            registry_config=settings.registry_config,
            progress=progress,
        )
    if args.json:
        output.print_json([{"path": one.path, "files": one.files, "size_bytes": one.size} for one in found])
        return 0
    rows = ((one.path, str(one.files), format_size(one.size)) for one in found)
    output.table(("DIRECTORY", "FILES", "SIZE"), rows)
    return 0


def _run_extract(args: argparse.Namespace) -> int:
    """Publish TARGET: SOURCE with directories of its layers made models, and attached."""
    settings = settings_of(args)
    wanted = [_directory(text) for text in args.directory]
    from floe.ingest.oci.extract import extract  # noqa: PLC0415 - lazy: keeps --help fast

    make_spool(settings)
    with (
        open_catalog(settings, signing=True) as catalog,
        output.progress(f"detach {args.target}", wanted=not args.json) as progress,
    ):
        made = extract(
            catalog,
            args.source,
            args.target,
            wanted,
            spool_dir=settings.spool,
            platform=args.platform,
            plain_http=args.plain_http or args.source_plain_http,
            target_plain_http=args.plain_http or args.target_plain_http,
            registry_config=settings.registry_config,
            workers=settings.workers,
            progress=progress,
        )
    result = made.result
    _warn(result.warnings)
    signatures.warn_unsigned(settings, result.target)
    models = [
        {"name": str(ref), "path": path, "manifest": digest}
        for (ref, path), digest in zip(wanted, made.digests, strict=True)
    ]
    if args.json:
        sizes = {"saved_bytes": made.saved_bytes, "new_bytes": made.new_bytes, "copied_bytes": result.copied_bytes}
        found: dict[str, Any] = {"digest": result.digest, "new_layers": made.new_layers, **sizes}
        shown = {"models": models, "warnings": list(result.warnings)}
        output.print_json({"source": args.source, "target": result.target, **found, **shown})
        return 0
    output.line(
        f"{result.target} is {result.digest}, {format_size(made.saved_bytes)} smaller than {args.source}: "
        f"{made.new_layers} layer{'' if made.new_layers == 1 else 's'} written anew"
    )
    for model in models:
        output.line(f"{model['name']} at {model['path']}")
    return 0


def _directory(text: str) -> tuple[ModelRef, str]:
    path, equals, name = text.rpartition("=")
    if not equals or not path.startswith("/"):
        raise BadInputError(f"--directory {text!r} is not PATH=NAME[:TAG]", hint="write /path/in/the/image=NAME[:TAG]")
    return parse_tagged(name)[0], path


def _meant(text: str) -> ModelRef | str:
    return text if text.startswith("/") else parse_model(text)[0]


def _shown(marker: Marker) -> dict[str, str]:
    return {"name": marker.model, "path": marker.path, "manifest": marker.manifest}


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        output.note(f"warning: {warning}")
