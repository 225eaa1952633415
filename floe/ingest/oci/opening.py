"""Image names to sources and targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from floe.ingest.oci.dockerarchive import DockerArchiveSource
from floe.ingest.oci.layout import LayoutSource, LayoutTarget
from floe.ingest.oci.references import LayoutRef, RegistryRef, parse_image_ref
from floe.ingest.oci.registry import Registry
from floe.ingest.oci.source import Source, Target
from floe.store.errors import BadInputError


def open_source(text: str, *, plain_http: bool = False, registry_config: Sequence[Path] = ()) -> Source:
    """Where the image `text` is read from. Close it.

    `registry_config`: directories of hosts.toml files (see Registry). BadInputError; NotFoundError for a layout or file
    that is not there.
    """
    ref = parse_image_ref(text)
    if isinstance(ref, RegistryRef):
        return Registry(ref, plain_http=plain_http, registry_config=registry_config)
    return LayoutSource(ref) if isinstance(ref, LayoutRef) else DockerArchiveSource(ref)


def open_target(text: str, *, plain_http: bool = False, registry_config: Sequence[Path] = ()) -> Target:
    """Where the image `text` is written to: a registry's NAME:TAG or `oci:DIR[:TAG]`. Close it."""
    ref = parse_image_ref(text)
    if isinstance(ref, RegistryRef):
        if ref.digest:
            raise BadInputError(f"cannot write to {text!r}: a digest is no name", hint="give a tag: NAME:TAG")
        return Registry(ref, plain_http=plain_http, registry_config=registry_config)
    if not isinstance(ref, LayoutRef):
        raise BadInputError(f"cannot write to {ref}", hint="use oci:DIR[:TAG] or HOST/NAME:TAG")
    return LayoutTarget(ref)
