"""Image names to sources and targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
    if not isinstance(ref, LayoutRef) or ref.archive:
        raise BadInputError(
            f"cannot write to {ref}: archives are only read",
            hint="use oci:DIR[:TAG] or HOST/NAME:TAG; `skopeo copy oci:DIR:TAG oci-archive:FILE` makes an archive of a layout",
        )
    return LayoutTarget(ref)


@contextlib.contextmanager
def open_both(
    source: str, target: str, *, plain_http: bool, target_plain_http: bool | None, registry_config: Sequence[Path]
) -> Iterator[tuple[Source, Target]]:
    """Where an image is read from and a new one is written to, closed afterwards.

    `plain_http` is for both, unless `target_plain_http` says otherwise of the target.
    """
    plain = plain_http if target_plain_http is None else target_plain_http
    with (
        contextlib.closing(open_source(source, plain_http=plain_http, registry_config=registry_config)) as found,
        contextlib.closing(open_target(target, plain_http=plain, registry_config=registry_config)) as written,
    ):
        yield found, written
