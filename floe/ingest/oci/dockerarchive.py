"""Images in a file of `docker save`, read in place.

The file holds `manifest.json`: a list of objects with `Config` and `Layers` (names of members) and `RepoTags`. Docker up
to 24, podman and skopeo write that alone, and a manifest is made up for the image; Docker from 25 on writes an OCI layout
around it, whose own manifest is then the image's. Source: Docker's image specification v1.2, "Combined Image JSON".
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.ingest.oci import media
from floe.ingest.oci.archive import Archive
from floe.ingest.oci.layout import blob_name
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.references import DockerArchiveRef, parse_registry_ref
from floe.ingest.oci.source import verified
from floe.store import jsontext
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError, UnsupportedError

_LIST, _INDEX = "manifest.json", "index.json"
_NESTING = 4  # indexes within indexes
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


@dataclass(frozen=True)
class _Entry:
    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]


class DockerArchiveSource:
    """The image `ref` of a file of `docker save`, to read. Thread-safe."""

    def __init__(self, ref: DockerArchiveRef) -> None:
        self.ref = ref
        self.name = str(ref)
        path = Path(ref.path)
        if not path.exists():
            raise NotFoundError(f"there is no file {path}", hint="check the path")
        if not path.is_file():
            raise BadInputError(f"{path} is no file", hint=f"did you mean oci:{path}?")
        self._archive = Archive(path)
        try:
            self._entry = self._choose(self._entries())
            self._members: dict[str, str] = {}  # digest: name of the member
            self._raw, self._kind = self._manifest()
        except BaseException:
            self._archive.close()
            raise

    def close(self) -> None:
        """See Source.close."""
        self._archive.close()

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest."""
        if descriptor is None or descriptor.digest == media.sha256_digest(self._raw):
            return self._raw, self._kind
        return b"".join(self.open_blob(descriptor)), descriptor.media_type

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        member = self._members.get(descriptor.digest, blob_name(descriptor.digest))
        pieces = self._archive.open(member)
        if pieces is None:
            raise NotFoundError(f"{self.ref.path} does not hold blob {descriptor.digest}", hint="save the image again")
        return verified(pieces, descriptor, self.name)

    # What the file lists

    def _entries(self) -> list[_Entry]:
        value = self._json(_LIST)
        if value is None:
            if _INDEX in self._archive:
                raise UnsupportedError(
                    f"{self.ref.path} has no {_LIST}", hint=f"did you mean oci-archive:{self.ref.path}?"
                )
            raise UnsupportedError(
                f"{self.ref.path} has no {_LIST}: it is no file of `docker save`, or of one before Docker 1.10"
            )
        if not isinstance(value, list) or not value:
            raise DamagedError(f"{_LIST} of {self.ref.path} lists no images")
        return [self._parse(item) for item in value]

    def _parse(self, item: Any) -> _Entry:
        values = item if isinstance(item, dict) else {}
        config, layers, tags = values.get("Config"), values.get("Layers") or [], values.get("RepoTags") or []
        if (
            isinstance(config, str)
            and isinstance(layers, list)
            and isinstance(tags, list)
            and all(isinstance(name, str) for name in (*layers, *tags))
        ):
            return _Entry(posixpath.normpath(config), tuple(map(posixpath.normpath, layers)), tuple(tags))
        raise DamagedError(f"{_LIST} of {self.ref.path} has a malformed entry")

    def _choose(self, entries: list[_Entry]) -> _Entry:
        if self.ref.number is not None:
            if self.ref.number < len(entries):
                return entries[self.ref.number]
            raise NotFoundError(
                f"{self.ref.path} has no image number {self.ref.number}", hint=f"it has {len(entries)}, from @0 on"
            )
        if self.ref.image is not None:
            wanted = str(self.ref.image)
            found = [entry for entry in entries if any(_full(tag) == wanted for tag in entry.tags)]
            if found:
                return found[0]
            raise NotFoundError(f"{self.ref.path} has no image {wanted}", hint=f"it has: {_listed(entries)}")
        if len(entries) > 1:
            raise BadInputError(
                f"{self.ref.path} holds {len(entries)} images: {_listed(entries)}",
                hint="give one: docker-archive:FILE:NAME:TAG, or docker-archive:FILE:@N by its number from 0",
            )
        return entries[0]

    # The manifest

    def _manifest(self) -> tuple[bytes, str]:
        size = self._archive.size(self._entry.config)
        if size is None:
            raise DamagedError(f"{self.ref.path} does not hold {self._entry.config}, which its {_LIST} names")
        media.check_size(Descriptor("", "", size), media.MAX_CONFIG, f"{self._entry.config} of {self.ref.path}")
        raw = b"".join(self._archive.open(self._entry.config) or ())
        config = Descriptor(media.DOCKER_CONFIG, media.sha256_digest(raw), len(raw))
        own = self._own_manifest(config.digest)
        if own is not None:
            return own
        self._members[config.digest] = self._entry.config
        diff_ids = media.parse_config(raw, f"the config of {self.name}").diff_ids
        if len(diff_ids) != len(self._entry.layers):
            raise DamagedError(
                f"{self.name} has {len(self._entry.layers)} layers, but its config names {len(diff_ids)} diff ids"
            )
        layers = [self._layer(name, diff_id) for name, diff_id in zip(self._entry.layers, diff_ids, strict=True)]
        made = {
            "schemaVersion": 2,
            "mediaType": media.DOCKER_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        return json.dumps(made, separators=(",", ":")).encode(), media.DOCKER_MANIFEST

    def _own_manifest(self, config: str) -> tuple[bytes, str] | None:
        """The manifest in the layout around `manifest.json` whose config is `config`, if all it needs is there."""
        raw = self._archive.read(_INDEX)
        waiting = [] if raw is None else [(raw, media.OCI_INDEX)]
        seen: set[str] = set()  # an index may list the same one many times, and that one too
        for _ in range(_NESTING):
            below: list[tuple[bytes, str]] = []
            for data, kind in waiting:
                found = self._parse_manifest(data, kind)
                if isinstance(found, media.ImageManifest):
                    blobs = (found.config, *found.layers)
                    if found.config.digest == config and all(blob_name(blob.digest) in self._archive for blob in blobs):
                        return data, found.media_type
                elif found is not None:
                    # Of an index for many platforms, the file holds those that were pulled.
                    fresh = {entry.digest: entry for entry in found.manifests if entry.digest not in seen}
                    seen |= fresh.keys()
                    held = ((self._archive.read(blob_name(entry.digest)), entry) for entry in fresh.values())
                    below += [
                        (data, entry.media_type)
                        for data, entry in held
                        if data is not None and media.sha256_digest(data) == entry.digest
                    ]
            waiting = below
        return None

    def _parse_manifest(self, data: bytes, kind: str) -> media.ImageManifest | media.ImageIndex | None:
        try:
            return media.parse_manifest(data, kind, self.name)
        except FloeError:
            return None  # an attestation, or another image's trouble: manifest.json says enough

    def _layer(self, name: str, diff_id: str) -> Descriptor:
        size = self._archive.size(name)
        pieces = self._archive.open(name)
        if size is None or pieces is None:
            raise DamagedError(f"{self.ref.path} does not hold {name}, which its {_LIST} names")
        begin = next(pieces, b"")[:4]
        suffix = ".gzip" if begin.startswith(_GZIP) else ".zstd" if begin == _ZSTD else ""
        digest = diff_id
        if suffix:
            named = _BLOB.fullmatch(name)
            digest = f"sha256:{named.group(1)}" if named else self._digest(name)
        self._members[digest] = name
        return Descriptor(f"{media.DOCKER_LAYER}{suffix}", digest, size)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self._archive.open(name) or ():
            digest.update(piece)
        return f"sha256:{digest.hexdigest()}"

    def _json(self, name: str) -> Any:
        raw = self._archive.read(name)
        try:
            return None if raw is None else jsontext.parse(raw)
        except ValueError as error:
            raise DamagedError(f"{name} of {self.ref.path} is not JSON: {error}") from error


def _full(tag: str) -> str:
    try:
        return str(parse_registry_ref(tag))
    except BadInputError:
        return tag


def _listed(entries: list[_Entry]) -> str:
    return ", ".join(", ".join(entry.tags) or f"@{number}" for number, entry in enumerate(entries))
