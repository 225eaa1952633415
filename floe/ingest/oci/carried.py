"""Which models an image carries: read out of its own stub layers, whoever attached them and to whichever store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from floe.ingest.oci import tarheader
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.source import Image
from floe.ingest.oci.stubs import is_annotated
from floe.ingest.oci.tarstream import TarStream
from floe.store.errors import DamagedError
from floe.store.stub import ANNOTATION, MARKER, MARKER_MAX, MODELS_AHEAD, Marker, models_ahead

MODELS_LABEL = "io.floe.models"
"""NAME:TAG=PATH of each model, with commas: a label of the config and, in OCI images, an annotation of the manifest."""
REQUIRES_LABEL = "io.floe.requires"
"""The oldest Floe whose nodes mount the image's models: a label of the config."""
REQUIRES = "floe >= 0.1.0"  # stubs of version 1
_STUB_MAX = 1 << 20  # bytes of a stub's tar: a README, a marker and a few directories
_STUB_BLOB_MAX = 64 << 10  # bytes of a layer that may be a stub without saying so
_CREATED_BY = "floe image attach "
PUBLISHED_BY = "floe model publish "
"""What the history of a model's own image begins with."""


@dataclass(frozen=True)
class Carried:
    """A model in an image: the `number` of its stub layer (from 0) and what the `marker` in it says."""

    number: int
    marker: Marker


def carried_models(image: Image) -> list[Carried]:
    """The models of `image`, bottom first. DamagedError: a layer that says that it stands for a model, and does not.

    A builder that knows nothing of Floe (Docker, on top of an attached image) loses the layers' annotations. It keeps labels and
    history: where those tell of models, small layers are looked into as well.
    """
    told = _tells_of_models(image.config.value)
    found = []
    for number, descriptor in enumerate(image.manifest.layers):
        annotated = is_annotated(descriptor)
        if not annotated and not (told and descriptor.size <= _STUB_BLOB_MAX):
            continue
        marker = _marker(image, number)
        if marker is not None:
            found.append(Carried(number, marker))
        elif annotated:
            raise DamagedError(
                f"{image.layer_name(number)} says that it stands for a model, but holds no {MARKER}",
                hint="start from the image as it was before the model was attached",
            )
    return found


def labels(markers: Sequence[Marker]) -> dict[str, str | None]:
    """The config's labels of an image that carries these models; None for what is to be removed."""
    return {MODELS_LABEL: models_text(markers), REQUIRES_LABEL: REQUIRES if markers else None}


def models_text(markers: Iterable[Marker]) -> str | None:
    """The models as labels and annotations list them."""
    return ",".join(f"{marker.model}={marker.path}" for marker in markers) or None


def announced(layers: Sequence[dict[str, Any]], stubs: Mapping[int, Marker]) -> list[dict[str, Any]]:
    """The layers' descriptors, each stub naming its model's tree, each other one the trees of all models.

    `stubs`: which of the layers they are. Nodes look at the annotations only; see floe/store/stub.py.
    """
    ahead = models_ahead(marker.tree for marker in stubs.values())
    result = []
    for number, layer in enumerate(layers):
        kept = {k: v for k, v in (layer.get("annotations") or {}).items() if k not in (ANNOTATION, MODELS_AHEAD)}
        if number in stubs:
            kept[ANNOTATION] = stubs[number].tree
        elif ahead:
            kept[MODELS_AHEAD] = ahead
        bare = {key: value for key, value in layer.items() if key != "annotations"}
        result.append({**bare, "annotations": kept} if kept else bare)
    return result


def _tells_of_models(config: Mapping[str, Any]) -> bool:
    inner, history = config.get("config"), config.get("history")
    known = inner.get("Labels") if isinstance(inner, dict) else None
    if isinstance(known, dict) and known.get(MODELS_LABEL):
        return True
    entries = history if isinstance(history, list) else []
    return any(
        isinstance(e, dict) and str(e.get("created_by", "")).startswith((_CREATED_BY, PUBLISHED_BY)) for e in entries
    )


def _marker(image: Image, number: int) -> Marker | None:
    what = image.layer_name(number)
    pieces = decompress(image.source.open_blob(image.manifest.layers[number]), what)
    stream = TarStream(_first(pieces), what)
    data: bytes | None = None
    files = set()
    try:
        for entry in stream:
            name = b"/".join(part for part in entry.name.split(b"/") if part not in (b"", b"."))
            if entry.type != tarheader.DIRECTORY:
                files.add(os.fsdecode(name))
            if name == MARKER.encode() and entry.type == tarheader.REG and entry.size <= MARKER_MAX:
                data = stream.content().read()
    except _TooLongError:
        return None
    # Only now, at its end, the blob is known to be what its digest says.
    if data is None:
        return None
    marker = Marker.decode(data, f"{MARKER} in {what}")
    place = marker.path.strip("/")
    own = {MARKER, *(f"{place}/{name}".lstrip("/") for name in ("README", ".wh..wh..opq"))}
    # As nodes see it: a layer that a builder squashed other files into is more than a stub, unless it says that it is one.
    return marker if files <= own or is_annotated(image.manifest.layers[number]) else None


class _TooLongError(Exception):
    pass


def _first(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The first bytes of a layer: a stub has no more."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > _STUB_MAX:
            raise _TooLongError
        yield piece


def created_by(marker: Marker) -> str:
    """What the config's history says of a stub layer."""
    return f"{_CREATED_BY}--model {marker.model}={marker.path}"
