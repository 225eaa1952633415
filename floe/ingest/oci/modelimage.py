"""A model as an image of its own: one stub layer, in whose place nodes with Floe mount the model's tree at the image's root.

That is the tree of the model itself, not one placed at a path: a node has it mounted once for all pods that have the image
as a volume and for mounts of the model. An index lists the image for each platform, since nodes unpack no other's.

Write order: blobs, which registries forget unless a manifest names them; the attachment records; the manifests, and last the
index under the target's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from floe.ingest.oci import carried, media, stubs
from floe.ingest.oci.attachments import protect, record_models
from floe.ingest.oci.derived import EPOCH, encode
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_target
from floe.ingest.oci.places import ROOT
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Target
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, NotFoundError
from floe.store.ids import ModelRef, check_text
from floe.store.progress import Adding, Progress
from floe.store.protection import Protection
from floe.store.stub import ANNOTATION, Marker

PLATFORMS = ("linux/amd64", "linux/arm64")
"""For which an image is made unless others are named: the same on every machine, and so is its digest."""


@dataclass(frozen=True)
class PublishResult:
    """The `target`'s full name, the `digest` of its index, and what it lists: (platform, manifest digest).

    `model` is the digest of the model's own manifest, to which the image is pinned; `copied_bytes` went over the wire.
    """

    target: str
    digest: str
    model: str
    manifests: tuple[tuple[str, str], ...]
    copied_bytes: int


@dataclass(frozen=True)
class _Made:
    """The image for one platform: its config and its manifest, with their descriptors."""

    platform: Platform
    config: Descriptor
    config_bytes: bytes
    manifest: Descriptor
    manifest_bytes: bytes


def publish_model(
    catalog: Catalog,
    ref: ModelRef,
    target: str,
    *,
    platforms: Sequence[str] = PLATFORMS,
    plain_http: bool = False,
    registry_config: Sequence[Path] = (),
    progress: Progress | None = None,
) -> PublishResult:
    """Write `target`: an image whose root is the model `ref`. The same model and platforms give the same digest.

    BadInputError: a target that cannot be written to, or a platform that is none. NotFoundError: no such model.
    UntrustedError: one that is not signed, where signatures are asked for. Raises the store's errors; a target's error leaves
    the store as it was, unless the last manifests are what it refuses.
    """
    wanted = list(dict.fromkeys(map(Platform.parse, platforms)))
    if not wanted:
        raise BadInputError("no platform to make an image for", hint="give --platform OS/ARCH, or leave it out")
    check_text(target, "image")
    with contextlib.closing(open_target(target, plain_http=plain_http, registry_config=registry_config)) as written:
        digest, manifest = catalog.resolve_model(ref)
        with contextlib.closing(Protection(catalog.store)) as protection:
            protect(protection, digest, manifest)
            try:
                catalog.get_manifest(digest)
            except NotFoundError as error:
                raise NotFoundError(f"model {ref} was removed meanwhile", hint="push it again") from error
            marker = Marker(manifest.tree.digest, ROOT, str(ref), digest)
            return _publish(catalog, marker, written, wanted, progress)


def _publish(
    catalog: Catalog, marker: Marker, target: Target, platforms: Sequence[Platform], progress: Progress | None
) -> PublishResult:
    tar, blob = stubs.build_stub(marker, {})
    layer = Descriptor(f"{media.OCI_LAYER}+gzip", media.sha256_digest(blob), len(blob), {ANNOTATION: marker.tree})
    made = [_make(marker, layer, media.sha256_digest(tar), platform) for platform in platforms]
    copied, told = 0, Adding(progress)
    blobs = ((layer, blob), *((one.config, one.config_bytes) for one in made))
    told.total(sum(len(data) for _, data in blobs))
    for descriptor, data in blobs:
        if not target.has_blob(descriptor):
            target.push_blob(descriptor, partial(iter, [data]))
            copied += len(data)
        told.advance(len(data))
    catalog.sign_tree(marker.tree)
    for one in made:
        record_models(catalog, one.manifest.digest, f"{marker.model} ({marker.manifest})", [marker])
    for one in made:
        target.put_manifest(one.manifest_bytes, media.OCI_MANIFEST, named=False)
    index = _index(marker, made)
    target.put_manifest(index, media.OCI_INDEX)
    manifests = tuple((str(one.platform), one.manifest.digest) for one in made)
    return PublishResult(target.name, media.sha256_digest(index), marker.manifest, manifests, copied)


def _make(marker: Marker, layer: Descriptor, diff_id: str, platform: Platform) -> _Made:
    config = encode(
        {
            "created": EPOCH,
            **_platform(platform),
            "config": {"Labels": carried.labels([marker])},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created": EPOCH, "created_by": f"{carried.PUBLISHED_BY}{marker.model}"}],
        }
    )
    described = Descriptor(media.OCI_CONFIG, media.sha256_digest(config), len(config))
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": media.OCI_MANIFEST,
            "config": described.to_json(),
            "layers": [layer.to_json()],
            "annotations": _annotations(marker),
        }
    )
    named = Descriptor(media.OCI_MANIFEST, media.sha256_digest(manifest), len(manifest))
    return _Made(platform, described, config, named, manifest)


def _index(marker: Marker, made: Sequence[_Made]) -> bytes:
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": media.OCI_INDEX,
            "manifests": [{**one.manifest.to_json(), "platform": _platform(one.platform)} for one in made],
            "annotations": _annotations(marker),
        }
    )


def _annotations(marker: Marker) -> dict[str, str | None]:
    return {carried.MODELS_LABEL: carried.models_text([marker])}


def _platform(platform: Platform) -> dict[str, Any]:
    variant = {"variant": platform.variant} if platform.variant else {}
    return {"architecture": platform.architecture, "os": platform.os, **variant}
