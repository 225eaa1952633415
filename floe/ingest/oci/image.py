"""An image to indexed layers: what is not in the store yet is read once and stored, then the image is recorded.

Layers are read in parallel, and what several of them hold is stored once. Nothing names what was stored before every
layer is complete: then come the layer refs, the chain refs, and the image record last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from floe.ingest.hotfiles import HotSink
from floe.ingest.oci import stubs
from floe.ingest.oci.ahead import Ahead
from floe.ingest.oci.compression import hashed, unpack
from floe.ingest.oci.hotlayers import HotLayers
from floe.ingest.oci.inherit import inherit
from floe.ingest.oci.layerplan import ALL_LAYERS, NEW_LAYERS, NO_LAYERS, Layer, Plan, layers_of
from floe.ingest.oci.layers import LayerTree, read_layer
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_source
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, resolve
from floe.ingest.oci.treeload import load_tree
from floe.ingest.publish import Ingest
from floe.ingest.session import Session
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import CancelledError, DamagedError, UnsupportedError
from floe.store.ids import check_text
from floe.store.nodes import Node
from floe.store.packindex import LAYER_FRAME
from floe.store.progress import Progress
from floe.store.records import KIND_LAYER, PARENT_LABEL, ChainRecord, ImageRecord

_PARALLEL = 4  # layers at once; each may hold some 200 MiB


@dataclass(frozen=True)
class IndexedLayer:
    """One layer of an indexed image. `manifest` is None for what Floe leaves to containerd: stubs of models.

    `laid_out`: it was stored before, and its hot files lie together now.
    """

    diff_id: str
    chain_id: str
    manifest: str | None
    reused: bool
    stub: bool = False
    laid_out: bool = False


@dataclass(frozen=True)
class IndexResult:
    """What indexing did. `new_bytes` and `new_packs` were stored anew; `warnings` are for people.

    `hot_bytes` of content were laid out together as profiles say, `copied_bytes` of them were in the store already.
    `repaired`: frames of damaged packs that were made anew, by pack.
    """

    record: ImageRecord
    layers: tuple[IndexedLayer, ...]
    new_packs: int
    new_bytes: int
    warnings: tuple[str, ...] = ()
    hot_bytes: int = 0
    copied_bytes: int = 0
    repaired: Mapping[str, int] = field(default_factory=dict)

    @property
    def new_layers(self) -> int:
        """Layers that were not in the store before."""
        return sum(layer.manifest is not None and not (layer.reused or layer.laid_out) for layer in self.layers)

    @property
    def laid_out_layers(self) -> int:
        """Layers that were in the store before, and were laid out anew."""
        return len({layer.diff_id for layer in self.layers if layer.laid_out})


def index_image(
    catalog: Catalog,
    ref: str,
    *,
    platform: str | Platform | None = None,
    plain_http: bool = False,
    registry_config: Sequence[Path] = (),
    spool_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    profile: str = NEW_LAYERS,
    verify: bool = False,
) -> IndexResult:
    """Index the image `ref` (see references.py) for `platform` (`os/arch[/variant]`; None: this machine's).

    `profile`: which layers have what starts read laid out together: NEW_LAYERS, ALL_LAYERS (those that are stored are read
    again for it) or NO_LAYERS. `verify`: read layers that are stored again, with the packs they lie in, and heal those that are
    damaged; those that were reported are in any case. `workers` threads hash and compress. `progress` counts bytes of layer blobs. Raises the
    store's errors; the store then names nothing of the image.
    """
    check_text(ref, "image")
    wanted = Platform.parse(platform) if isinstance(platform, str) else platform
    with (
        told_what_to_do(),
        contextlib.closing(open_source(ref, plain_http=plain_http, registry_config=registry_config)) as source,
    ):
        image = resolve(source, wanted)
        return index_resolved(
            catalog, image, spool_dir=spool_dir, workers=workers, progress=progress, profile=profile, verify=verify
        )


def index_resolved(
    catalog: Catalog,
    image: Image,
    *,
    spool_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    profile: str = NEW_LAYERS,
    verify: bool = False,
) -> IndexResult:
    """The same for an image that is found already; its source stays open meanwhile. What `progress` raises stops it."""
    return _Indexing(catalog, image, spool_dir, workers, progress, profile=profile, verify=verify).run()


@contextlib.contextmanager
def told_what_to_do() -> Iterator[None]:
    """Errors of images get a hint, where they have none: the store's own know better; what is left came out of the image."""
    try:
        yield
    except (DamagedError, UnsupportedError) as error:
        error.hint = error.hint or "build or push the image again"
        raise


class _Indexing:
    def __init__(
        self,
        catalog: Catalog,
        image: Image,
        spool_dir: Path,
        workers: int | None,
        progress: Progress | None,
        *,
        profile: str,
        verify: bool,
    ) -> None:
        self._catalog, self._image, self._spool_dir, self._progress = catalog, image, spool_dir, progress
        self._workers = workers or os.cpu_count() or 2
        self._session = Session(catalog.store)
        self._hot = HotLayers(catalog, image, self._session.packs)
        self._plan = Plan(catalog, image, self._session, self._hot, profile, verify=verify)
        self._verify = verify
        self._repaired: dict[str, int] = {}
        self._lock = threading.Lock()  # guards the sums below and `progress`
        self._loading = threading.Lock()  # one thread at a time loads the tree of a layer that is reused
        self._warnings: list[str] = []
        self._new_packs = self._new_bytes = self._hot_bytes = self._copied_bytes = 0
        self._layers = layers_of(image)

    def run(self) -> IndexResult:
        with contextlib.closing(self._session):
            return self._run()

    def _run(self) -> IndexResult:
        self._catalog.ensure_store()
        todo = self._plan.to_read(self._layers)
        if todo:
            self._catalog.sync_chunks()
            if self._progress is not None:
                self._progress.total(sum(self._image.manifest.layers[layer.number].size for layer in todo))
            self._read_all(todo)
        return self._publish()

    def _read_all(self, todo: list[Layer]) -> None:
        parallel = min(len(todo), self._workers, _PARALLEL)
        with ThreadPoolExecutor(parallel, thread_name_prefix="floe-layer") as pool:
            # Lower layers first: one that waits for a lower layer's tree never waits for one that has not begun.
            jobs = [pool.submit(self._read, layer, max(1, self._workers // parallel)) for layer in todo]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                self._session.stop()
                for job in jobs:
                    job.cancel()
        failures = [error for job in jobs if not job.cancelled() and (error := job.exception()) is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, CancelledError)), failures[0])

    def _read(self, layer: Layer, workers: int) -> None:
        try:
            self._ingest(layer, workers)
        finally:
            if not layer.tree.done():
                layer.tree.set_exception(CancelledError("indexing was stopped"))

    def _ingest(self, layer: Layer, workers: int) -> None:
        what = self._image.layer_name(layer.number)
        with Ingest(
            self._catalog,
            spool_dir=self._spool_dir,
            frame_size=LAYER_FRAME,
            workers=workers,
            sync=False,
            session=self._session,
            laid_out=self._hot.places(layer.number) if layer.hot else None,
            verify=self._verify,
        ) as ingest:
            tree = self._read_tree(layer, ingest, what)
            if stubs.has_marker(tree.root):
                layer.stub = True
                layer.tree.set_result(tree.root)
                ingest.leave()
                self._count(ingest, [])
                return
            labels = {"floe.diff-id": layer.diff_id}
            if tree.implicit:
                if any(not lower.reused and not lower.tree.done() for lower in self._layers[: layer.number]):
                    ingest.flush()  # before waiting for the layers below
                labels[PARENT_LABEL] = layer.parent
                below = [self._root_of(lower) for lower in reversed(self._layers[: layer.number])]
                inherit(tree.implicit, below, what)
            layer.tree.set_result(tree.root)
            previous = layer.known[1] if layer.known else None
            found = ingest.finish(tree.root, KIND_LAYER, self._image.name, labels, previous=previous)
            if layer.known is not None and layer.known[1].tree == found[1].tree:
                layer.result = layer.known  # the same over these lower layers as over those it was indexed with
            elif layer.known is None or layer.again or (layer.suspect and layer.fits):
                layer.result = found
            else:
                layer.usable = False
            layer.hot_packs = ingest.hot_packs
            self._count(ingest, tree.warnings)

    def _count(self, ingest: Ingest, warnings: list[str]) -> None:
        with self._lock:
            self._new_packs += ingest.stats.new_packs
            self._new_bytes += ingest.stats.new_bytes
            self._hot_bytes += ingest.stats.hot_bytes
            self._copied_bytes += ingest.stats.copied_bytes
            for pack_id, frames in ingest.stats.repaired.items():
                self._repaired[pack_id] = self._repaired.get(pack_id, 0) + frames
            self._warnings += [*warnings, *ingest.stats.warnings]

    def _read_tree(self, layer: Layer, ingest: Ingest, what: str) -> LayerTree:
        descriptor = self._image.manifest.layers[layer.number]
        digests: list[str] = []
        with Ahead(self._tar(descriptor, digests, what)) as tar:
            tree = read_layer(iter(tar), ingest, what, HotSink(ingest, layer.hot) if layer.hot else None)
        (found,) = digests
        if found != layer.diff_id:
            raise DamagedError(
                f"{what} does not match its diff id: the config says {layer.diff_id}, its content is {found}",
                hint="build or push the image again",
            )
        return tree

    def _tar(self, descriptor: Descriptor, digests: list[str], what: str) -> Iterator[bytes]:
        """The layer's tar stream; at its end its sha256 is added to `digests`."""
        counted = self._counted(self._image.source.open_blob(descriptor))
        is_plain, pieces = unpack(counted, what)
        if is_plain:
            yield from pieces
            digests.append(descriptor.digest)  # the source has checked it
            return
        digest = hashlib.sha256()
        yield from hashed(pieces, digest)
        for _ in counted:  # bytes behind the compressed stream still count for the blob's digest
            pass
        digests.append(f"sha256:{digest.hexdigest()}")

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if self._session.stopping:
                raise CancelledError("indexing was stopped")
            if self._progress is not None:
                with self._lock:
                    self._progress.advance(len(piece))
            yield piece

    def _root_of(self, layer: Layer) -> stubs.RootOf:
        def root() -> Node:
            twin = next(other for other in self._layers if other.diff_id == layer.diff_id)
            if twin.stub and not twin.tree.done():
                return stubs.EMPTY
            with self._loading:
                if twin.reused and twin.known is not None and not twin.tree.done():
                    twin.tree.set_result(load_tree(self._catalog, twin.known[1]))
            return twin.tree.result()

        return root

    def _publish(self) -> IndexResult:
        by_diff = {layer.diff_id: layer for layer in self._layers if layer.result or layer.stub or not layer.usable}
        stored = [layer for layer in self._layers if by_diff[layer.diff_id].result]
        chains = [layout.chain_ref_key(layer.chain_id) for layer in stored]
        self._session.protection.protect([*(layout.layer_ref_key(layer.diff_id) for layer in stored), *chains])
        self._session.protection.renew()
        for layer in by_diff.values():
            # Signed by somebody else who is trusted, it is signed by us as well.
            news = layer.result is not layer.known or self._catalog.vouching.signer is not None
            if layer.result is not None and news:
                self._catalog.set_layer(layer.diff_id, layer.result[0])
        layers = []
        for layer in self._layers:
            done = by_diff[layer.diff_id]
            if done.result is not None:
                self._catalog.set_chain(layer.chain_id, ChainRecord(layer.diff_id, layer.parent or None))
            elif not done.stub:
                self._warnings.append(
                    f"{self._image.layer_name(layer.number)} takes directory attributes from the layers below it, and "
                    "other ones in an image indexed before: in this image it will be unpacked the ordinary way"
                )
            manifest = done.result[0] if done.result else None
            reused = done.result is not None and done.result is done.known
            laid_out = done.again and not reused
            layers.append(IndexedLayer(layer.diff_id, layer.chain_id, manifest, reused, done.stub, laid_out))
        record = ImageRecord(
            manifest_digest=self._image.manifest.digest,
            names=(self._image.name,),
            platform=str(self._image.platform),
            diff_ids=tuple(layer.diff_id for layer in self._layers),
            chain_ids=tuple(layer.chain_id for layer in self._layers),
            size=sum(descriptor.size for descriptor in self._image.manifest.layers),
            indexed=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self._catalog.set_image(record)
        self._seed_profiles(by_diff)
        return IndexResult(
            record,
            tuple(layers),
            self._new_packs,
            self._new_bytes,
            (*self._hot.warnings, *self._warnings),
            self._hot_bytes,
            self._copied_bytes,
            self._repaired,
        )

    def _seed_profiles(self, layers: Mapping[str, Layer]) -> None:
        for layer in layers.values():
            if layer.result is not None:
                before = layer.known[1].tree.digest if layer.known and layer.again else None
                self._hot.published(layer.number, layer.result[1].tree.digest, layer.hot_packs, before)


__all__ = [
    "ALL_LAYERS",
    "NEW_LAYERS",
    "NO_LAYERS",
    "PARENT_LABEL",
    "IndexResult",
    "IndexedLayer",
    "index_image",
    "index_resolved",
    "open_source",
    "told_what_to_do",
]
