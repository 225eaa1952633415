"""Manifests, indexes and image configurations: which kinds there are, and what Floe reads of them. Pure.

Sources: OCI image-spec (manifest.md, image-index.md, config.md) and Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from floe.store import jsontext
from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.ids import Buffer

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

INDEXES, MANIFESTS, CONFIGS = (OCI_INDEX, DOCKER_LIST), (OCI_MANIFEST, DOCKER_MANIFEST), (OCI_CONFIG, DOCKER_CONFIG)
ACCEPT = f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_LIST}, {DOCKER_MANIFEST}"
LAYERS = (
    OCI_LAYER, f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+zstd",
    DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", f"{DOCKER_LAYER}.zstd",
)  # fmt: skip
MAX_MANIFEST = 4 << 20  # bytes; registries refuse larger ones
MAX_CONFIG = 16 << 20  # bytes

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_INT = 1 << 62


@dataclass(frozen=True)
class Descriptor:
    """A reference to a blob: `digest` is sha256:<hex>, `size` in bytes. `platform` is the index's entry, if any."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value


@dataclass(frozen=True)
class ImageManifest:
    """One platform's image: `raw` are the exact bytes that `digest` names; layers bottom first."""

    media_type: str
    digest: str
    raw: bytes
    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True)
class ImageIndex:
    """A list of manifests, one per platform (or, in a layout, per tag)."""

    media_type: str
    digest: str
    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True)
class ImageConfig:
    """`raw` bytes and the parsed `value`; `diff_ids` bottom first; `os`, `architecture`, `variant` as written."""

    raw: bytes
    value: Mapping[str, Any]
    diff_ids: tuple[str, ...]
    os: str
    architecture: str
    variant: str


def sha256_digest(data: Buffer) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def parse_manifest(raw: bytes, media_type: str, what: str) -> ImageManifest | ImageIndex:
    """Parse a manifest or an index; `what` names it in errors.

    The body's own `mediaType` counts before the one it was sent with. DamagedError: not a manifest. UnsupportedError:
    schema 1, or a kind that Floe does not know.
    """
    value = _object(raw, what)
    kind = value.get("mediaType") or media_type
    if not isinstance(kind, str):
        raise DamagedError(f"{what} has a media type that is no text")
    kind = kind.partition(";")[0].strip()
    if value.get("schemaVersion") == 1 or kind.startswith("application/vnd.docker.distribution.manifest.v1"):
        raise UnsupportedError(
            f"{what} is a Docker schema 1 manifest ({kind})",
            hint="push the image again with a current Docker, or convert it with skopeo",
        )
    if not kind or kind in ("application/json", "application/octet-stream", "text/plain"):
        kind = OCI_INDEX if "manifests" in value else OCI_MANIFEST
    if kind in INDEXES:
        manifests = _list(value, "manifests", what)
        return ImageIndex(kind, sha256_digest(raw), tuple(parse_descriptor(m, what) for m in manifests))
    if kind not in MANIFESTS:
        raise UnsupportedError(f"{what} has the media type {kind!r}, which is not an image's")
    config = parse_descriptor(value.get("config"), what)
    layers = tuple(parse_descriptor(layer, what) for layer in _list(value, "layers", what))
    return ImageManifest(kind, sha256_digest(raw), raw, config, layers)


def check_image(manifest: ImageManifest, what: str) -> None:
    """UnsupportedError when `manifest` is no container image, or has a layer that Floe cannot read, naming its type."""
    if manifest.config.media_type not in CONFIGS:
        raise UnsupportedError(f"{what} is not a container image: its config is {manifest.config.media_type!r}")
    for number, layer in enumerate(manifest.layers, 1):
        kind = layer.media_type
        name = f"layer {number} of {what} ({layer.digest})"
        if kind.endswith("+encrypted"):
            raise UnsupportedError(f"{name} is encrypted ({kind})", hint="use an image that is not encrypted")
        if "nondistributable" in kind or ".foreign." in kind:
            raise UnsupportedError(
                f"{name} is a foreign layer ({kind}): its content lies outside of the registry",
                hint="use an image whose layers the registry holds",
            )
        if kind not in LAYERS:
            raise UnsupportedError(
                f"{name} has the unknown media type {kind!r}",
                hint="build it with tar layers, uncompressed or compressed with gzip or zstd",
            )


def parse_config(raw: bytes, what: str) -> ImageConfig:
    """Parse an image configuration; DamagedError when it is none."""
    value = _object(raw, what)
    rootfs = value.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    diff_ids = [] if diff_ids is None else diff_ids
    if not isinstance(diff_ids, list) or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in diff_ids):
        raise DamagedError(f"{what} has diff ids that are not sha256 digests")
    texts = [value.get(key) or "" for key in ("os", "architecture", "variant")]
    if not all(isinstance(text, str) for text in texts):
        raise DamagedError(f"{what} has a platform that is no text")
    return ImageConfig(raw, value, tuple(diff_ids), *texts)


def parse_descriptor(value: Any, what: str) -> Descriptor:
    """A descriptor out of parsed JSON; DamagedError when a part is missing or of the wrong kind."""
    if not isinstance(value, dict):
        raise DamagedError(f"{what} has a descriptor that is no object")
    kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    annotations, platform = value.get("annotations") or {}, value.get("platform")
    if not isinstance(kind, str) or not isinstance(digest, str):
        raise DamagedError(f"{what} has a descriptor without media type or digest")
    if _DIGEST.fullmatch(digest) is None:
        raise UnsupportedError(
            f"{what} names a blob by {jsontext.shown(digest)}, not by sha256:<64 lowercase hex digits>"
        )
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < _MAX_INT:
        raise DamagedError(f"{what} gives blob {digest} the size {jsontext.shown(size)}")
    if not isinstance(annotations, dict) or not isinstance(platform, (dict, type(None))):
        raise DamagedError(f"{what} has a descriptor with malformed annotations or platform")
    texts = {str(key): str(item) for key, item in annotations.items()}
    return Descriptor(kind, digest, size, texts, platform)


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = jsontext.parse(raw, MAX_CONFIG)
    except ValueError as error:
        raise DamagedError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{what} is not a JSON object")
    return value


def _list(value: dict[str, Any], key: str, what: str) -> list[Any]:
    items = value.get(key)
    if items is None:
        items = []
    if not isinstance(items, list):
        raise DamagedError(f"{what} has {key!r} that is no list")
    return items


def check_size(descriptor: Descriptor, limit: int, what: str) -> None:
    """BadInputError when a blob that must be read into memory is larger than `limit` bytes."""
    if descriptor.size > limit:
        raise BadInputError(f"{what} is {descriptor.size} bytes; at most {limit} are read")
