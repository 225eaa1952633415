"""Models taken off an image again: the same image without their stub layers, under another name.

Write order as in attach.py: the record of the models that stay, the blobs, the target's manifest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from floe.ingest.oci import carried, derived, media, places
from floe.ingest.oci.attachments import keep, record
from floe.ingest.oci.carried import Carried
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_both
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, Target, resolve
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, NotFoundError
from floe.store.ids import ModelRef, check_text
from floe.store.progress import Progress
from floe.store.protection import Protection
from floe.store.stub import Marker


@dataclass(frozen=True)
class DetachResult:
    """The `target`'s full name and manifest digest; which models went, and which it still carries, bottom first."""

    target: str
    digest: str
    detached: tuple[Marker, ...]
    left: tuple[Marker, ...]
    copied_bytes: int
    warnings: tuple[str, ...] = ()


def detach(
    catalog: Catalog,
    source: str,
    target: str,
    models: Sequence[ModelRef | str] | None,
    *,
    platform: str | Platform | None = None,
    plain_http: bool = False,
    target_plain_http: bool | None = None,
    registry_config: Sequence[Path] = (),
    progress: Progress | None = None,
) -> DetachResult:
    """Write `target`: the image `source` of one platform without `models`, or without all that it carries (None).

    A model is a reference or the absolute path at which the image has it. A reference to `latest` also means the image's only model
    of that name. What a model hid of the image is seen again. The models themselves stay in the store, and so does what
    it knows of `source`.

    BadInputError: a reference that means several of the image's models. NotFoundError: no such image, or one that does not carry
    what is to be detached. Raises the store's errors; the target is then not there, or as it was.
    """
    if models is not None and not models:
        raise BadInputError("no model to detach", hint="give --model NAME[:TAG] or --model /PATH, or --all")
    for name in (source, target):
        check_text(name, "image")
    wanted = Platform.parse(platform) if isinstance(platform, str) else platform
    with open_both(
        source,
        target,
        plain_http=plain_http,
        target_plain_http=target_plain_http,
        registry_config=registry_config,
    ) as (found, written):
        image = resolve(found, wanted)
        present = carried.carried_models(image)
        gone = choose(present, models, image.name)
        return _Detaching(catalog, image, written, present).run(gone, progress)


def choose(present: Sequence[Carried], models: Sequence[ModelRef | str] | None, name: str) -> list[Carried]:
    """Those of the models that are `present` in the image `name` which `models` mean (None: all); see `detach`."""
    if models is None:
        if not present:
            raise NotFoundError(f"{name} carries no models", hint="there is nothing to detach from it")
        return list(present)
    chosen: dict[int, Carried] = {}
    for model in models:
        found = _meant(present, model)
        if not found:
            raise NotFoundError(f"{name} does not carry {model}", hint=_listed(present))
        if len(found) > 1:
            raise BadInputError(f"{name} carries {model} more than once", hint=f"give a path; {_listed(present)}")
        chosen[found[0].number] = found[0]
    return [chosen[number] for number in sorted(chosen)]


def _meant(present: Sequence[Carried], model: ModelRef | str) -> list[Carried]:
    if isinstance(model, str):
        path = places.check_path(model)
        return [found for found in present if found.marker.path == path]
    if model.digest:
        names = [(found, ModelRef.parse(found.marker.model)) for found in present]
        return [found for found, ref in names if (ref.name, found.marker.manifest) == (model.name, model.digest)]
    exactly = [found for found in present if found.marker.model == str(model)]
    if exactly or model.tag != "latest":
        return exactly
    return [found for found in present if ModelRef.parse(found.marker.model).name == model.name]


class _Detaching:
    def __init__(self, catalog: Catalog, image: Image, target: Target, present: Sequence[Carried]) -> None:
        self._catalog, self._image, self._target, self._present = catalog, image, target, present

    def run(self, gone: Sequence[Carried], progress: Progress | None) -> DetachResult:
        image, numbers = self._image, {found.number for found in gone}
        if len(numbers) == len(image.manifest.layers) and any(found.marker.path == places.ROOT for found in gone):
            raise BadInputError(
                f"{image.name} is a model, as an image of its own: without it nothing is left",
                hint="remove the image from where it lies, and what the store knows of it with `floe image rm`",
            )
        left = [found for found in self._present if found.number not in numbers]
        markers = [found.marker for found in left]
        config = derived.derive_config(image, gone=numbers, labels=carried.labels(markers))
        config_descriptor = Descriptor(image.manifest.config.media_type, media.sha256_digest(config), len(config))
        manifest = self._manifest(config_descriptor, numbers, left)
        digest = media.sha256_digest(manifest)
        with contextlib.closing(Protection(self._catalog.store)) as protection:
            kept = keep(self._catalog, protection, left)
            writing = derived.Writing(image, self._target, progress)
            stay = [descriptor for number, descriptor in enumerate(image.manifest.layers) if number not in numbers]
            writing.expect([*stay, config_descriptor])
            for descriptor in stay:
                writing.copy(descriptor)
            writing.push(config_descriptor, partial(iter, [config]))
            protection.renew()
            if kept.markers:
                record(self._catalog, digest, image, kept.markers)
            self._target.put_manifest(manifest, image.manifest.media_type)
        detached = tuple(found.marker for found in gone)
        return DetachResult(self._target.name, digest, detached, tuple(markers), writing.copied_bytes, kept.warnings)

    def _manifest(self, config: Descriptor, gone: set[int], left: Sequence[Carried]) -> bytes:
        numbered = enumerate(derived.raw_layers(self._image))
        layers = [(number, layer) for number, layer in numbered if number not in gone]
        moved = {number: place for place, (number, _) in enumerate(layers)}
        stub_of = {moved[found.number]: found.marker for found in left}
        announced = carried.announced([layer for _, layer in layers], stub_of)
        annotations = {carried.MODELS_LABEL: carried.models_text(stub_of.values())}
        return derived.derive_manifest(self._image, config, announced, annotations)


def _listed(present: Sequence[Carried]) -> str:
    listed = ", ".join(f"{found.marker.model} at {found.marker.path}" for found in present)
    return f"it carries {listed}" if listed else "it carries no models"
