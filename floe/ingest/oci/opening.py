"""Image names to sources and targets."""

from __future__ import annotations

from floe.ingest.oci.layout import LayoutSource, LayoutTarget
from floe.ingest.oci.references import RegistryRef, parse_image_ref
from floe.ingest.oci.registry import Registry
from floe.ingest.oci.source import Source, Target
from floe.store.errors import BadInputError


def open_source(text: str, *, plain_http: bool = False) -> Source:
    """Where the image `text` is read from; BadInputError, NotFoundError for a layout that is not there. Close it."""
    ref = parse_image_ref(text)
    return Registry(ref, plain_http=plain_http) if isinstance(ref, RegistryRef) else LayoutSource(ref)


def open_target(text: str, *, plain_http: bool = False) -> Target:
    """Where the image `text` is written to: a registry's NAME:TAG or `oci:DIR[:TAG]`. Close it."""
    ref = parse_image_ref(text)
    if isinstance(ref, RegistryRef):
        if ref.digest:
            raise BadInputError(f"cannot write to {text!r}: a digest is no name", hint="give a tag: NAME:TAG")
        return Registry(ref, plain_http=plain_http)
    return LayoutTarget(ref)
