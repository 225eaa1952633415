"""A model attached to an image: the same image plus a stub layer per model, under another name.

Write order: placed trees, the attachment record, the image's blobs, and last the target's manifest. Whoever finds the
target therefore finds all that it needs, and no collector of garbage takes the trees away in between.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from floe.ingest.entries import place_tree
from floe.ingest.oci import media, places, stubs
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.layers import OPAQUE_VALUE, OPAQUE_XATTR, LayerTree, read_layer
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_source, open_target
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, Target, resolve
from floe.ingest.oci.tarstream import Content
from floe.ingest.oci.treeload import load_tree
from floe.ingest.publish import publish_tree
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UntrustedError
from floe.store.ids import ModelRef, check_text
from floe.store.nodes import FileContent, Node, chunk_bits
from floe.store.profiles import ProfileStore, model_source
from floe.store.progress import Progress
from floe.store.protection import Protection
from floe.store.records import AttachmentRecord, Manifest
from floe.store.stub import ANNOTATION, MODELS_AHEAD, Marker, models_ahead

MODELS_ANNOTATION = "io.floe.models"


@dataclass(frozen=True)
class AttachResult:
    """The `target`'s full name and manifest digest; `stubs` are its new layers; `copied_bytes` went over the wire."""

    target: str
    manifest_digest: str
    stubs: tuple[Descriptor, ...]
    copied_bytes: int

    @property
    def digest(self) -> str:
        """The target's manifest digest."""
        return self.manifest_digest


@dataclass(frozen=True)
class _Placed:
    ref: ModelRef
    path: str
    digest: str
    manifest: Manifest


@dataclass(frozen=True)
class _Stub:
    descriptor: Descriptor
    diff_id: str
    blob: bytes
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

    BadInputError: a path that cannot be, or that leads through a symlink of the image. NotFoundError: no such model
    or image. UntrustedError: a model that is not signed, where signatures are asked for. Raises the store's errors; the target is then not there, or as it was.
    """
    if not models:
        raise BadInputError("no model to attach", hint="give --model NAME[:TAG]=PATH")
    for name in (source, target):
        check_text(name, "image")
    paths = [places.check_path(path) for _, path in models]
    wanted = Platform.parse(platform) if isinstance(platform, str) else platform
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(
            contextlib.closing(open_source(source, plain_http=plain_http, registry_config=registry_config))
        )
        plain = plain_http if target_plain_http is None else target_plain_http
        written = stack.enter_context(
            contextlib.closing(open_target(target, plain_http=plain, registry_config=registry_config))
        )
        placed = [_Placed(ref, path, *catalog.resolve_model(ref)) for (ref, _), path in zip(models, paths, strict=True)]
        image = resolve(found, wanted)
        return _Attaching(catalog, image, written, placed, progress).run()


class _Attaching:
    def __init__(
        self, catalog: Catalog, image: Image, target: Target, models: list[_Placed], progress: Progress | None
    ) -> None:
        self._catalog, self._image, self._target, self._models = catalog, image, target, models
        self._progress = progress
        self._copied = 0
        self._protection = Protection(catalog.store)
        known = catalog.attachment(image.manifest.digest)
        self._before: tuple[dict[str, str], ...] = known.models if known else ()

    def run(self) -> AttachResult:
        with contextlib.closing(self._protection):
            return self._run()

    def _run(self) -> AttachResult:
        self._protect_models()
        places.check_apart([*(str(model.get("path")) for model in self._before), *(m.path for m in self._models)])
        above = [parent for model in self._models for parent in places.parents_of(model.path)]
        parents = places.look_up([*above, *(model.path for model in self._models)], self._layers(), self._image.name)
        new = [self._stub(model, parents) for model in self._models]
        config = self._config(new)
        config_type = self._image.manifest.config.media_type
        config_descriptor = Descriptor(config_type, media.sha256_digest(config), len(config))
        manifest = self._manifest(new, config_descriptor)
        digest = media.sha256_digest(manifest)
        self._record(digest, new)
        for descriptor in self._image.manifest.layers:
            self._copy(descriptor)
        for stub in new:
            self._push(stub.descriptor, stub.blob)
        self._push(config_descriptor, config)
        self._target.put_manifest(manifest, self._image.manifest.media_type)
        return AttachResult(self._target.name, digest, tuple(stub.descriptor for stub in new), self._copied)

    def _protect_models(self) -> None:
        """Content that is to be named once more stays from now on; what went before that is told."""
        for model in self._models:
            packs = (layout.pack_key(pack.id) for pack in model.manifest.packs)
            tree = layout.tree_key(model.manifest.tree.digest)
            self._protection.protect((layout.manifest_key(model.digest), tree, *packs))
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
        docker = self._image.manifest.media_type == media.DOCKER_MANIFEST
        kind = f"{media.DOCKER_LAYER}.gzip" if docker else f"{media.OCI_LAYER}+gzip"
        descriptor = Descriptor(kind, media.sha256_digest(blob), len(blob), {ANNOTATION: tree})
        return _Stub(descriptor, media.sha256_digest(tar), blob, marker)

    def _layers(self) -> Iterator[LayerTree]:
        """The image's layers, topmost first: out of the store, or else their headers out of the image."""
        manifest, config = self._image.manifest, self._image.config
        for number in reversed(range(len(manifest.layers))):
            if stubs.is_annotated(manifest.layers[number]):
                continue  # its directories are copies of the image's
            tree: LayerTree | None = None
            with contextlib.suppress(NotFoundError, DamagedError, UntrustedError):
                indexed = self._catalog.layer(config.diff_ids[number])
                tree = LayerTree(load_tree(self._catalog, indexed[1])) if indexed else None
            if tree is not None:
                yield tree
                continue
            what = self._image.layer_name(number)
            pieces = self._image.source.open_blob(manifest.layers[number])
            yield read_layer(decompress(pieces, what), _Nowhere(), what)

    def _config(self, new: list[_Stub]) -> bytes:
        value: dict[str, Any] = json.loads(self._image.config.raw)
        value["rootfs"]["diff_ids"] = [*self._image.config.diff_ids, *(stub.diff_id for stub in new)]
        history = value.get("history")
        if history:
            created = value.get("created") or "1970-01-01T00:00:00Z"
            value["history"] = [
                *history,
                *(
                    {"created": created, "created_by": f"floe image attach --model {s.marker.model}={s.marker.path}"}
                    for s in new
                ),
            ]
        return _json(value)

    def _manifest(self, new: list[_Stub], config: Descriptor) -> bytes:
        value: dict[str, Any] = json.loads(self._image.manifest.raw)
        value["config"] = config.to_json()
        ahead = models_ahead([*(str(m.get("tree")) for m in self._before), *(stub.marker.tree for stub in new)])
        layers = [_announcing(layer, ahead) for layer in value["layers"]]
        value["layers"] = [*layers, *(stub.descriptor.to_json() for stub in new)]
        if self._image.manifest.media_type == media.OCI_MANIFEST:
            models = [*(f"{m.get('name')}={m.get('path')}" for m in self._before), *(_label(stub) for stub in new)]
            value["annotations"] = {**(value.get("annotations") or {}), MODELS_ANNOTATION: ",".join(models)}
        return _json(value)

    def _copy(self, descriptor: Descriptor) -> None:
        if self._target.has_blob(descriptor) or self._target.mount_blob(descriptor, self._image.source):
            return
        self._target.push_blob(descriptor, self._counted(self._image.source.open_blob(descriptor)))

    def _push(self, descriptor: Descriptor, blob: bytes) -> None:
        if not self._target.has_blob(descriptor):
            self._target.push_blob(descriptor, self._counted(iter([blob])))

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._copied += len(piece)
            if self._progress is not None:
                self._progress.advance(len(piece))
            yield piece

    def _record(self, digest: str, new: list[_Stub]) -> None:
        models = (
            *self._before,
            *(
                {"name": s.marker.model, "manifest": s.marker.manifest, "tree": s.marker.tree, "path": s.marker.path}
                for s in new
            ),
        )
        source = f"{self._image.name} ({self._image.manifest.digest})"
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._catalog.set_attachment(AttachmentRecord(digest, source, models, created))


class _Nowhere:
    """A sink for contents nobody needs: only the headers of a layer are read."""

    def add_stream(self, readable: Content, size: int) -> FileContent:  # noqa: ARG002 - the stream passes over it
        return FileContent(size, chunk_bits(size), ())


def _plain(node: Node) -> Node:
    """A directory's attributes without those that overlayfs keeps in `trusted.`: an opaque parent would hide others."""
    xattrs = {key: value for key, value in node.xattrs.items() if not key.startswith(b"trusted.")}
    return Node(node.mode, node.uid, node.gid, node.mtime, node.mtime_ns, xattrs=xattrs)


def _announcing(layer: dict[str, Any], ahead: str) -> dict[str, Any]:
    """A layer's descriptor that also names the image's models; that of a stub as it is."""
    annotations = layer.get("annotations") or {}
    return layer if ANNOTATION in annotations else {**layer, "annotations": {**annotations, MODELS_AHEAD: ahead}}


def _label(stub: _Stub) -> str:
    return f"{stub.marker.model}={stub.marker.path}"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
