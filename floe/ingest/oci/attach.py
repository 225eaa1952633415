"""Models attached to an image: the same image plus a stub layer per model, under another name.

Write order: placed trees, the attachment record, the image's blobs, and last the target's manifest. Whoever finds the
target therefore finds all that it needs, and no collector of garbage takes the trees away in between.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from floe.ingest.entries import place_tree
from floe.ingest.oci import carried, derived, media, places, stubs
from floe.ingest.oci.attachments import Kept, keep, protect, record
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.derived import NewLayer
from floe.ingest.oci.layers import OPAQUE_VALUE, OPAQUE_XATTR, LayerTree, read_layer
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_both
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, Target, resolve
from floe.ingest.oci.tarstream import Content
from floe.ingest.oci.treeload import load_tree
from floe.ingest.treeout import publish_tree
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UntrustedError
from floe.store.ids import ModelRef, check_text
from floe.store.nodes import FileContent, Node, chunk_bits
from floe.store.profiles import ProfileStore, model_source
from floe.store.progress import Adding, Progress
from floe.store.protection import Protection
from floe.store.records import Manifest
from floe.store.stub import ANNOTATION, Marker

MODELS_ANNOTATION = carried.MODELS_LABEL


@dataclass(frozen=True)
class AttachResult:
    """The `target`'s full name and manifest digest; `stubs` are its new layers; `copied_bytes` went over the wire."""

    target: str
    manifest_digest: str
    stubs: tuple[Descriptor, ...]
    copied_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The target's manifest digest."""
        return self.manifest_digest


@dataclass(frozen=True)
class Addition:
    """What else is new in the target: `layers` between the image and the stubs, labels and members of its config."""

    layers: tuple[NewLayer, ...] = ()
    labels: Mapping[str, str | None] | None = None
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Placed:
    ref: ModelRef
    path: str
    digest: str
    manifest: Manifest


@dataclass(frozen=True)
class _Stub:
    layer: NewLayer
    marker: Marker


def attach(
    catalog: Catalog,
    source: str,
    target: str,
    models: Sequence[tuple[ModelRef, str]],
    *,
    platform: str | Platform | None = None,
    plain_http: bool = False,
    target_plain_http: bool | None = None,
    registry_config: Sequence[Path] = (),
    spool_dir: Path | None = None,  # noqa: ARG001 - nothing is spooled; callers treat all pushes alike
    progress: Progress | None = None,
) -> AttachResult:
    """Write `target`: the image `source` of one platform, with each (model, absolute path) as a stub layer.

    `plain_http`: without TLS, where the source is a registry, and the target unless `target_plain_http` says otherwise.

    BadInputError: a path that cannot be, that leads through a symlink of the image, or that is, holds or lies in the path of another model, a
    new one or one that the image carries already. NotFoundError: no such model or image. UntrustedError: a model that is not
    signed, where signatures are asked for. Raises the store's errors; the target is then not there, or as it was.
    """
    if not models:
        raise BadInputError("no model to attach", hint="give --model NAME[:TAG]=PATH")
    for name in (source, target):
        check_text(name, "image")
    places.check_apart(places.check_path(path) for _, path in models)
    wanted = Platform.parse(platform) if isinstance(platform, str) else platform
    with open_both(
        source,
        target,
        plain_http=plain_http,
        target_plain_http=target_plain_http,
        registry_config=registry_config,
    ) as (found, written):
        return attach_to(catalog, lambda: resolve(found, wanted), written, models, progress=progress)


def attach_to(
    catalog: Catalog,
    image: Callable[[], Image],
    target: Target,
    models: Sequence[tuple[ModelRef, str]],
    *,
    digests: Mapping[str, str] | None = None,
    addition: Addition | None = None,
    progress: Progress | None = None,
) -> AttachResult:
    """The same with a target that is open; `image` is called once the models are found. There may be no model at all.

    `digests`: by path, which manifest a model's name means, whatever its tag means by now.
    """
    placed = []
    for ref, given in models:
        path = places.check_path(given)
        pinned = (digests or {}).get(given)
        placed.append(_Placed(ref, path, *catalog.resolve_model(ModelRef(ref.name, None, pinned) if pinned else ref)))
    places.check_apart(model.path for model in placed)
    return _Attaching(catalog, image(), target, placed, addition=addition or Addition(), progress=progress).run()


class _Attaching:
    def __init__(
        self,
        catalog: Catalog,
        image: Image,
        target: Target,
        models: list[_Placed],
        *,
        addition: Addition,
        progress: Progress | None,
    ) -> None:
        self._catalog, self._image, self._target, self._models = catalog, image, target, models
        self._addition = addition
        self._before: dict[int, Marker] = {}  # stubs of the image, by the number of their layer
        self._writing = derived.Writing(image, target, progress)
        self._protection = Protection(catalog.store)

    def run(self) -> AttachResult:
        with contextlib.closing(self._protection):
            return self._run()

    def _run(self) -> AttachResult:
        before = carried.carried_models(self._image)
        self._before = {found.number: found.marker for found in before}
        places.check_apart([*(found.marker.path for found in before), *(model.path for model in self._models)])
        above = [parent for model in self._models for parent in places.parents_of(model.path)]
        parents = places.look_up([*above, *(model.path for model in self._models)], self._layers(), self._image.name)
        self._protect_models()
        kept = keep(self._catalog, self._protection, before)
        new = [self._stub(model, parents) for model in self._models]
        return self._write(kept, new)

    def _write(self, kept: Kept, new: list[_Stub]) -> AttachResult:
        extra = [*self._addition.layers, *(stub.layer for stub in new)]
        markers = [*self._before.values(), *(stub.marker for stub in new)]
        labels = {**(self._addition.labels or {}), **carried.labels(markers)}
        config = derived.derive_config(self._image, new=extra, labels=labels, settings=self._addition.settings)
        config_type = self._image.manifest.config.media_type
        config_descriptor = Descriptor(config_type, media.sha256_digest(config), len(config))
        manifest = self._manifest(config_descriptor, extra, new)
        digest = media.sha256_digest(manifest)
        needed = [*kept.markers, *(stub.marker for stub in new)]
        self._writing.expect([*self._image.manifest.layers, *(layer.descriptor for layer in extra), config_descriptor])
        for descriptor in self._image.manifest.layers:
            self._writing.copy(descriptor)
        for layer in extra:
            self._writing.push(layer.descriptor, layer.open)
        self._writing.push(config_descriptor, partial(iter, [config]))
        # Not before: a registry that refuses would leave a record of what nobody has, which keeps the models for ever.
        self._protection.renew()
        if needed:
            record(self._catalog, digest, self._image, needed)
        self._target.put_manifest(manifest, self._image.manifest.media_type)
        stub_layers = tuple(stub.layer.descriptor for stub in new)
        return AttachResult(self._target.name, digest, stub_layers, self._writing.copied_bytes, kept.warnings)

    def _protect_models(self) -> None:
        """Content that is to be named once more stays from now on; what went before that is told."""
        for model in self._models:
            protect(self._protection, model.digest, model.manifest)
            try:
                self._catalog.get_manifest(model.digest)
            except NotFoundError as error:
                raise NotFoundError(f"model {model.ref} was removed meanwhile", hint="push it again") from error

    def _stub(self, model: _Placed, parents: dict[str, Node]) -> _Stub:
        root = load_tree(self._catalog, model.manifest)
        # Whatever the image has at this path is hidden: the model is what is found there, and nothing else.
        xattrs = {**root.xattrs, OPAQUE_XATTR: OPAQUE_VALUE}
        top = Node(root.mode, root.uid, root.gid, root.mtime, root.mtime_ns, xattrs=xattrs, children=root.children)
        above = {path: node for path, node in parents.items() if path in places.parents_of(model.path)}
        placed = place_tree(top, model.path, {k: _plain(v) for k, v in above.items()})
        tree = publish_tree(self._catalog, placed, self._protection)
        self._catalog.sign_tree(tree)
        prefix = os.fsencode(model.path.strip("/")) + b"/"
        ProfileStore(self._catalog).seed(tree, model_source(model.ref.name), prefix)
        marker = Marker(tree, model.path, str(model.ref), model.digest)
        tar, blob = stubs.build_stub(marker, above)
        kind = derived.layer_type(self._image)
        descriptor = Descriptor(kind, media.sha256_digest(blob), len(blob), {ANNOTATION: tree})
        diff_id, text = media.sha256_digest(tar), carried.created_by(marker)
        return _Stub(NewLayer(descriptor, diff_id, text, lambda: iter([blob]), lambda: iter([tar])), marker)

    def _layers(self) -> Iterator[LayerTree]:
        """The target's layers below the new stubs, topmost first: out of the store, or else their headers alone."""
        name = self._image.name
        for layer in reversed(self._addition.layers):
            yield read_layer(layer.tar(), _Nowhere(), f"a layer that is added to {name}")
        yield from image_layers(self._catalog, self._image, self._before)

    def _manifest(self, config: Descriptor, extra: list[NewLayer], new: list[_Stub]) -> bytes:
        found = [*derived.raw_layers(self._image), *(layer.descriptor.to_json() for layer in extra)]
        first = len(found) - len(new)
        stub_of = {**self._before, **{first + number: stub.marker for number, stub in enumerate(new)}}
        text = carried.models_text(stub_of.values())
        annotations = {carried.MODELS_LABEL: text}
        return derived.derive_manifest(self._image, config, carried.announced(found, stub_of), annotations)


def image_layers(
    catalog: Catalog, image: Image, stub_numbers: Collection[int], progress: Progress | None = None
) -> Iterator[LayerTree]:
    """The layers of `image` that are no stubs, topmost first: out of the store, or else their headers out of the image.

    `progress` counts bytes of layer blobs; those of a layer that the store has at once.
    """
    # The directories of a stub are copies of the image's.
    wanted = [number for number in reversed(range(len(image.manifest.layers))) if number not in stub_numbers]
    told = Adding(progress)
    told.total(sum(image.manifest.layers[number].size for number in wanted))
    for number in wanted:
        blob = image.manifest.layers[number]
        tree: LayerTree | None = None
        with contextlib.suppress(NotFoundError, DamagedError, UntrustedError):
            indexed = catalog.layer(image.config.diff_ids[number])
            tree = LayerTree(load_tree(catalog, indexed[1])) if indexed else None
        if tree is not None:
            told.advance(blob.size)
            yield tree
            continue
        what = image.layer_name(number)
        yield read_layer(decompress(told.passing(image.source.open_blob(blob)), what), _Nowhere(), what)


class _Nowhere:
    """A sink for contents nobody needs: only the headers of a layer are read."""

    def add_stream(self, readable: Content, size: int) -> FileContent:  # noqa: ARG002 - the stream passes over it
        return FileContent(size, chunk_bits(size), ())


def _plain(node: Node) -> Node:
    """A directory's attributes without those that overlayfs keeps in `trusted.`: an opaque parent would hide others."""
    xattrs = {key: value for key, value in node.xattrs.items() if not key.startswith(b"trusted.")}
    return Node(node.mode, node.uid, node.gid, node.mtime, node.mtime_ns, xattrs=xattrs)
