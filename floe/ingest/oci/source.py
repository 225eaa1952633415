"""Where images come from and go to, behind two narrow interfaces, and an image resolved to one platform."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from floe.ingest.oci import media
from floe.ingest.oci.media import Descriptor, ImageConfig, ImageIndex, ImageManifest
from floe.ingest.oci.platforms import Platform, choose
from floe.store.errors import DamagedError, NotFoundError, UnsupportedError

_NESTING = 4  # indexes within indexes


class Source(Protocol):
    """Where an image is read from. Thread-safe."""

    name: str
    """The image's full name, as recorded and as shown."""

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """A manifest's or index's bytes and media type: what the name stands for, or what an index lists.

        NotFoundError, AccessDeniedError, UnavailableError, DamagedError (the digest does not match).
        """
        ...

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """The blob in pieces; the end comes only after size and digest matched, else DamagedError. Close it."""
        ...

    def close(self) -> None:
        """Release connections and files."""
        ...


class Target(Protocol):
    """Where an image is written to. A manifest comes after its blobs."""

    name: str

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the target holds the blob already."""
        ...

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """Take the blob over without moving its bytes, when `source` allows that; False: it must be pushed."""
        ...

    def push_blob(self, descriptor: Descriptor, opened: Callable[[], Iterable[bytes]]) -> None:
        """Store a blob, which `opened` gives the bytes of, from the beginning each time; its digest is checked."""
        ...

    def put_manifest(self, raw: bytes, media_type: str, *, named: bool = True) -> None:
        """Store the manifest, and let the target's name stand for it; else it is found by its digest."""
        ...

    def close(self) -> None:
        """Release connections and files."""
        ...


@dataclass(frozen=True)
class Image:
    """An image of one platform: every layer is of a kind that Floe reads, and has its diff id."""

    source: Source
    manifest: ImageManifest
    config: ImageConfig
    platform: Platform

    @property
    def name(self) -> str:
        """The name it was found by."""
        return self.source.name

    def layer_name(self, number: int) -> str:
        """How messages call layer `number` (from 0)."""
        return f"layer {number + 1} of {self.name} ({self.manifest.layers[number].digest})"


def resolve(source: Source, platform: Platform | None = None) -> Image:
    """The image for `platform` (None: Linux on this machine's processor, but a single image of any platform will do).

    NotFoundError lists the platforms there are; UnsupportedError and DamagedError name the layer or manifest.
    """
    wanted = platform or Platform.default()
    raw, kind = source.manifest()
    found = media.parse_manifest(raw, kind, f"the manifest of {source.name}")
    from_index = False
    for _ in range(_NESTING):
        if isinstance(found, ImageManifest):
            break
        from_index = True
        chosen = _choose(found, wanted, source.name)
        raw, kind = source.manifest(chosen)
        found = media.parse_manifest(raw, kind, f"manifest {chosen.digest} of {source.name}")
    else:
        raise UnsupportedError(f"{source.name} has indexes within indexes, more than {_NESTING} deep")
    media.check_image(found, source.name)
    config = media.parse_config(read_blob(source, found.config, media.MAX_CONFIG), f"the config of {source.name}")
    if len(config.diff_ids) != len(found.layers):
        raise DamagedError(
            f"{source.name} has {len(found.layers)} layers, but its config names {len(config.diff_ids)} diff ids"
        )
    actual = Platform.make(config.os or "linux", config.architecture or wanted.architecture, config.variant)
    if platform is not None and not from_index and not platform.accepts(actual):
        raise _no_platform(source.name, platform, [actual])
    return Image(source, found, config, actual)


def _choose(index: ImageIndex, wanted: Platform, name: str) -> Descriptor:
    offered = [Platform.of(entry.platform) for entry in index.manifests]
    number = choose(wanted, offered)
    if number is not None:
        return index.manifests[number]
    if len(index.manifests) == 1 and offered[0] is None:
        return index.manifests[0]
    raise _no_platform(name, wanted, [item for item in offered if item is not None])


def _no_platform(name: str, wanted: Platform, offered: list[Platform]) -> NotFoundError:
    listed = ", ".join(dict.fromkeys(map(str, offered))) or "none"
    return NotFoundError(f"{name} has no image for {wanted}; it has: {listed}", hint="choose one with --platform")


def read_blob(source: Source, descriptor: Descriptor, limit: int) -> bytes:
    """A small blob whole."""
    media.check_size(descriptor, limit, f"blob {descriptor.digest} of {source.name}")
    return b"".join(source.open_blob(descriptor))


def verified(pieces: Iterable[bytes], descriptor: Descriptor, what: str) -> Iterator[bytes]:
    """`pieces`, with an end only when their size and sha256 are the descriptor's; DamagedError otherwise."""
    digest = hashlib.sha256()
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > descriptor.size:
            break
        digest.update(piece)
        yield piece
    if size != descriptor.size:
        more = "more than " if size > descriptor.size else ""
        raise DamagedError(
            f"blob {descriptor.digest} of {what} has {more}{min(size, descriptor.size)} bytes, not {descriptor.size}"
        )
    found = "sha256:" + digest.hexdigest()
    if found != descriptor.digest:
        raise DamagedError(
            f"blob {descriptor.digest} of {what} does not match its digest: its content is {found}",
            hint="push the image again",
        )
