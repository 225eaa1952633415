"""`floe bento`: push and image."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import output, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.options import (
    PUSHING,
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
from floe.cli.sizes import format_size
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from floe.cli.settings import Settings
    from floe.ingest.bento.find import Bento, FoundModel
    from floe.ingest.bento.push import PushedModel
    from floe.store.catalog import Catalog

_BUILDERS = ("buildah", "buildctl")


def add_parser(commands: Commands) -> None:
    """Add `floe bento` and its commands."""
    below = add_commands(add_command(commands, "bento", "Store the models of Bentos; make images without them."))
    push = add_command(below, "push", "Store the models of a Bento, each as a model of its own.", run_push)
    image = add_command(below, "image", "Make a Bento's image, its models attached instead of copied.", run_image)
    for parser in (push, image):
        parser.add_argument(
            "bento", metavar="BENTO|PATH", help="NAME[:VERSION], a Bento's folder, or its export (.bento)"
        )
    image.add_argument("target", metavar="TARGET", help="where the image goes: HOST/NAME:TAG or oci:DIR[:TAG]")
    way = image.add_mutually_exclusive_group()
    text = "build upon this image, which has Python and the Bento's packages, instead of by the Bento's Dockerfile"
    way.add_argument("--base", metavar="IMAGE", help=text)
    way.add_argument("--builder", choices=_BUILDERS, help="what runs the Bento's Dockerfile (the first that is there)")
    add_platform(image, "of the image, or of a multi-platform base")
    add_plain_http(image, "base", "target")
    for parser in (push, image):
        text = "BentoML's store (the variable BENTOML_HOME, else ~/bentoml)"
        parser.add_argument("--bentoml-home", type=Path, default=None, metavar="DIR", help=text)
        text = (
            "Hugging Face's cache (the variables BENTOML_HF_CACHE_DIR, HF_HUB_CACHE, HF_HOME, else as huggingface_hub)"
        )
        parser.add_argument("--hub-cache", type=Path, default=None, metavar="DIR", help=text)
        parser.add_argument("--read-again", action="store_true", help="read models that the store has already, too")
        add_verify(parser)
        add_settings(parser, *PUSHING)
        add_json(parser)
    add_settings(image, "registry_config")


def run_push(args: argparse.Namespace) -> int:
    """Store a Bento's models."""
    settings = settings_of(args)
    with _opened(args, settings) as (bento, models):
        if not models:
            raise BadInputError(
                f"Bento {bento} names no models", hint="there is nothing to push: its files go into its image"
            )
        with open_catalog(settings, signing=True) as catalog:
            pushed = _push(args, settings, catalog, bento, models)
        shown = {"bento": str(bento), "models": [_describe(model) for model in pushed]}
    for model in pushed:
        signatures.warn_unsigned(settings, str(model.ref))
    if args.json:
        output.print_json(shown)
    else:
        _tell(pushed)
    return 0


def run_image(args: argparse.Namespace) -> int:
    """Store a Bento's models and publish its image, which carries them."""
    settings = settings_of(args)
    from floe.ingest.bento.build import build, check_buildable, find_builder  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.ingest.bento.files import check_files  # noqa: PLC0415 - likewise
    from floe.ingest.bento.image import prepare_image  # noqa: PLC0415 - likewise
    from floe.ingest.oci.opening import open_target  # noqa: PLC0415 - likewise

    plain = {side: args.plain_http or vars(args)[f"{side}_plain_http"] for side in ("base", "target")}
    open_target(args.target, plain_http=plain["target"], registry_config=settings.registry_config).close()
    builder = None if args.base else find_builder(args.builder)
    # What cannot be is refused before anything is built, and a build that fails before anything is stored.
    with (
        _opened(args, settings) as (bento, models),
        open_catalog(settings, signing=True) as catalog,
        _folder(settings) as folder,
    ):
        if builder is not None:
            check_files(bento.path)
            check_buildable(bento, os.environ)
        with prepare_image(
            catalog,
            bento,
            models,
            args.base or build(bento, str(builder), folder, os.environ, args.platform),
            args.target,
            has_files=builder is not None,
            platform=args.platform,
            plain_http=plain["base"],
            target_plain_http=plain["target"],
            registry_config=settings.registry_config,
        ) as prepared:
            pushed = _push(args, settings, catalog, bento, models)
            with output.progress(f"image {args.target}", wanted=not args.json) as progress:
                made = prepared.write(pushed, folder, progress=progress)
        shown = [{**_describe(model), "path": path} for model, path in made.models]
        name = str(bento)
    warnings = [*made.warnings, *(() if pushed else (f"Bento {name} names no models: the image carries none",))]
    for warning in warnings:
        output.note(f"warning: {warning}")
    signatures.warn_unsigned(settings, made.result.target)
    if args.json:
        found: dict[str, Any] = {"target": made.result.target, "digest": made.result.digest}
        copied = {"copied_bytes": made.result.copied_bytes, "warnings": warnings}
        output.print_json({"bento": name, **found, **copied, "models": shown})
        return 0
    _tell(pushed)
    output.line(f"{made.result.target} is {made.result.digest}, {format_size(made.result.copied_bytes)} copied")
    for model in shown:
        output.line(f"{model['name']} at {model['path']}")
    return 0


@contextmanager
def _opened(args: argparse.Namespace, settings: Settings) -> Iterator[tuple[Bento, list[FoundModel]]]:
    """The Bento and its models on this machine; all of them are found, or it is an error."""
    from floe.ingest.bento.find import bentoml_home, find_models, open_bento  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.ingest.bento.hub import cache_folder  # noqa: PLC0415 - likewise

    make_spool(settings)
    home = args.bentoml_home or bentoml_home(os.environ)
    with open_bento(args.bento, home, settings.spool) as bento:
        yield bento, find_models(bento, args.hub_cache or cache_folder(os.environ))


def _push(
    args: argparse.Namespace, settings: Settings, catalog: Catalog, bento: Bento, models: list[FoundModel]
) -> list[PushedModel]:
    from floe.ingest.bento.push import push_models  # noqa: PLC0415 - lazy: keeps --help fast

    with output.progress(f"push {bento}", wanted=not args.json) as progress:
        pushed = push_models(
            catalog,
            bento,
            models,
            spool_dir=settings.spool,
            workers=settings.workers,
            progress=progress,
            read_again=args.read_again,
            verify=args.verify,
        )
    for warning in (warning for model in pushed for warning in model.warnings):
        output.note(f"warning: {warning}")
    return pushed


@contextmanager
def _folder(settings: Settings) -> Iterator[Path]:
    """For what an image is made of; removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bento-image-", dir=settings.spool))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _describe(model: PushedModel) -> dict[str, Any]:
    return {
        "name": str(model.ref),
        "manifest": model.digest,
        "previous": model.previous,
        "reused": model.reused,
        "total_bytes": model.total_bytes,
        "new_bytes": model.new_bytes,
    }


def _tell(pushed: list[PushedModel]) -> None:
    for model in pushed:
        if model.moved:
            output.line(f"{model.ref} moved from {model.previous} to {model.digest}")
        size = format_size(model.total_bytes)
        what = "in the store already" if model.reused else f"{format_size(model.new_bytes)} of it stored anew"
        output.line(f"{model.ref}: {size}, {what}")
