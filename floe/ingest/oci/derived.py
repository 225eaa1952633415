"""An image made out of another one: layers taken out or put on top, with a config and a manifest that say so.

The same image and the same changes give the same bytes, and so the same digest: nothing here asks for the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from floe.ingest.oci import media
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.source import Image, Source, Target, verified
from floe.store.errors import DamagedError
from floe.store.progress import Adding, Progress

EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True)
class NewLayer:
    """A layer that goes on top: its blob's `descriptor`, the `diff_id` of its tar, and `created_by` for the history.

    `open` gives the blob's bytes, as often as it is called; `tar` gives those of the tar inside.
    """

    descriptor: Descriptor
    diff_id: str
    created_by: str
    open: Callable[[], Iterator[bytes]]
    tar: Callable[[], Iterator[bytes]]


def layer_type(image: Image) -> str:
    """The media type of a gzipped layer in an image of this kind."""
    docker = image.manifest.media_type == media.DOCKER_MANIFEST
    return f"{media.DOCKER_LAYER}.gzip" if docker else f"{media.OCI_LAYER}+gzip"


def derive_config(
    image: Image,
    *,
    gone: Collection[int] = (),
    diff_ids: Mapping[int, str] | None = None,
    new: Sequence[NewLayer] = (),
    labels: Mapping[str, str | None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> bytes:
    """The config without the layers of the numbers in `gone` (from 0), with other `diff_ids` for some, with `new` ones above.

    `labels` are set, `settings` replace members of the config's `config` (`Env`, `User`, ...); what is None is removed.
    """
    value: dict[str, Any] = json.loads(image.config.raw)
    layers = image.config.diff_ids
    kept = [(diff_ids or {}).get(number, known) for number, known in enumerate(layers) if number not in gone]
    rootfs = value["rootfs"] = value.get("rootfs") or {"type": "layers"}
    rootfs["diff_ids"] = [*kept, *(layer.diff_id for layer in new)]
    history = value.get("history")
    if history:
        created = value.get("created") or EPOCH
        added = [{"created": created, "created_by": layer.created_by} for layer in new]
        value["history"] = [*_history(history, gone, len(layers), image.name), *added]
    inner = {**(value.get("config") or {}), **(settings or {})}
    inner = {key: item for key, item in inner.items() if item is not None or key not in (settings or {})}
    if labels:
        found = {**(inner.get("Labels") or {}), **labels}
        inner["Labels"] = {key: text for key, text in found.items() if text is not None}
        if not inner["Labels"]:
            del inner["Labels"]
    if inner or "config" in value:
        value["config"] = inner
    return encode(value)


def derive_manifest(
    image: Image,
    config: Descriptor,
    layers: Sequence[Mapping[str, Any]],
    annotations: Mapping[str, str | None],
) -> bytes:
    """The manifest with this config and these layers; of an OCI image `annotations` are set, or removed where None."""
    value: dict[str, Any] = json.loads(image.manifest.raw)
    value["config"] = config.to_json()
    value["layers"] = list(layers)
    if image.manifest.media_type == media.OCI_MANIFEST:
        found = {**(value.pop("annotations", None) or {}), **annotations}
        kept = {key: text for key, text in found.items() if text is not None}
        if kept:
            value["annotations"] = kept
    return encode(value)


def raw_layers(image: Image) -> list[dict[str, Any]]:
    """The layers' descriptors as they stand in the manifest, members that Floe does not know included."""
    layers: list[dict[str, Any]] = json.loads(image.manifest.raw).get("layers") or []
    return layers


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON as configs and manifests are written here: compact, members in their order."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


class Edited:
    """The source of an image that was edited: `blobs` are opened here, all others where the image came from.

    `digest`: the manifest's, before.
    """

    def __init__(self, inner: Source, digest: str, blobs: Mapping[str, Callable[[], Iterator[bytes]]]) -> None:
        self.inner, self.digest, self.name, self._blobs = inner, digest, inner.name, blobs

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest: as it was before."""
        return self.inner.manifest(descriptor)

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        made = self._blobs.get(descriptor.digest)
        return self.inner.open_blob(descriptor) if made is None else verified(made(), descriptor, self.name)

    def origin(self, descriptor: Descriptor) -> Source | None:
        """Where the blob may be taken over from; None: it was made here."""
        return None if descriptor.digest in self._blobs else self.inner

    def close(self) -> None:
        """See Source.close."""
        self.inner.close()


class Writing:
    """Blobs on their way from `image`, or from here, to `target`; `copied_bytes` were sent.

    `progress` counts the bytes of `expect`ed blobs; those of one that the target has at once.
    """

    def __init__(self, image: Image, target: Target, progress: Progress | None) -> None:
        self._image, self._target, self._progress = image, target, Adding(progress)
        self.copied_bytes = 0

    def expect(self, descriptors: Iterable[Descriptor]) -> None:
        """These will be copied or pushed."""
        self._progress.total(sum(descriptor.size for descriptor in descriptors))

    def copy(self, descriptor: Descriptor) -> None:
        """Let the target have a blob of the image; DamagedError when its bytes are not what its digest says."""
        source = self._image.source
        origin = source.origin(descriptor) if isinstance(source, Edited) else source
        if self._target.has_blob(descriptor) or (origin and self._target.mount_blob(descriptor, origin)):
            self._progress.advance(descriptor.size)
            return
        self._target.push_blob(descriptor, self._counted(lambda: self._image.source.open_blob(descriptor)))

    def push(self, descriptor: Descriptor, opened: Callable[[], Iterable[bytes]]) -> None:
        """Let the target have a blob that was made here; `opened` as for Target.push_blob."""
        if self._target.has_blob(descriptor):
            self._progress.advance(descriptor.size)
        else:
            self._target.push_blob(descriptor, self._counted(opened))

    def _counted(self, opened: Callable[[], Iterable[bytes]]) -> Callable[[], Iterator[bytes]]:
        """The same, each byte counted once, however often it is sent."""
        furthest = 0

        def counted() -> Iterator[bytes]:
            nonlocal furthest
            at = 0
            for piece in opened():
                at += len(piece)
                new = max(0, at - furthest)
                furthest += new
                self.copied_bytes += new
                self._progress.advance(new)
                yield piece

        return counted


def _history(history: Any, gone: Collection[int], layers: int, name: str) -> list[Any]:
    """The entries that stay. Each that is not marked empty stands for the next layer."""
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise DamagedError(f"the config of {name} has a history that is no list of objects", hint="build it again")
    filled = [number for number, entry in enumerate(history) if not entry.get("empty_layer")]
    if not gone or len(filled) != layers:
        return list(history)  # a history that does not tell the layers apart is left alone
    dropped = {filled[number] for number in gone}
    return [entry for number, entry in enumerate(history) if number not in dropped]
