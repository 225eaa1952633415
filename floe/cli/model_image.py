"""`floe model publish`: a model as an image of its own."""

from __future__ import annotations

import argparse

from floe.cli import output, signatures
from floe.cli.context import open_catalog
from floe.cli.names import parse_model
from floe.cli.options import (
    SIGNING,
    Commands,
    add_command,
    add_json,
    add_plain_http,
    add_platform,
    add_settings,
    settings_of,
)


def add_parser(below: Commands) -> None:
    """Add `publish` below `floe model`."""
    text = "Make an image that is a model, for image volumes of pods; its content is fetched as it is read."
    parser = add_command(below, "publish", text, run)
    parser.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    parser.add_argument("target", metavar="TARGET", help="where the image goes: HOST/NAME:TAG or oci:DIR[:TAG]")
    add_platform(parser, "of nodes that use it; may be given several times (linux/amd64 and linux/arm64)", several=True)
    add_plain_http(parser)
    add_settings(parser, "registry_config", *SIGNING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Publish TARGET."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    from floe.ingest.oci.modelimage import PLATFORMS, publish_model  # noqa: PLC0415 - lazy: keeps --help fast

    with (
        open_catalog(settings, trusting=True, signing=True) as catalog,
        output.progress(f"publish {args.target}", wanted=not args.json) as progress,
    ):
        result = publish_model(
            catalog,
            ref,
            args.target,
            platforms=args.platform or PLATFORMS,
            plain_http=args.plain_http,
            registry_config=settings.registry_config,
            progress=progress,
        )
    signatures.warn_unsigned(settings, result.target)
    if args.json:
        manifests = [{"platform": platform, "digest": digest} for platform, digest in result.manifests]
        image = {"target": result.target, "digest": result.digest, "manifests": manifests}
        output.print_json({"name": str(ref), "manifest": result.model, **image, "copied_bytes": result.copied_bytes})
        return 0
    output.line(f"{result.target} is {result.digest}: {ref} at {result.model}")
    for platform, digest in result.manifests:
        output.line(f"{platform}: {digest}")
    return 0
