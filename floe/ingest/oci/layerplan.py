"""Which layers of an image must be read: those that the store does not have, or not whole, or that are to be laid out anew."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from floe.ingest.hotcontent import LEAST
from floe.ingest.hotfiles import HotFiles
from floe.ingest.oci import stubs
from floe.ingest.oci.hotlayers import HotLayers
from floe.ingest.oci.source import Image
from floe.ingest.session import Session
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, NotFoundError, UntrustedError
from floe.store.ids import chain_ids
from floe.store.nodes import Node
from floe.store.packindex import PackIndex
from floe.store.records import PARENT_LABEL, Manifest, Ref
from floe.store.treeobject import decode_tree

# Whether start-up profiles say where content goes: for layers that are new, for those too that are stored already, or not.
NEW_LAYERS, ALL_LAYERS, NO_LAYERS = "new", "all", "none"


@dataclass
class Layer:
    """A layer on its way. `known` is what the store has under its diff id."""

    number: int
    diff_id: str
    chain_id: str
    parent: str
    known: tuple[str, Manifest] | None = None
    stub: bool = False
    usable: bool = True
    again: bool = False  # what is known is read again, to be laid out
    suspect: bool = False  # what is known is read again, for it may be damaged
    hot: HotFiles = field(default_factory=HotFiles)
    hot_packs: tuple[str, ...] = ()
    result: tuple[str, Manifest] | None = None
    tree: Future[Node] = field(default_factory=Future)

    @property
    def reused(self) -> bool:
        """Whether what the store has is used as it is."""
        return not self.again and not self.suspect and self.fits

    @property
    def fits(self) -> bool:
        """Whether what the store has can be used in this image."""
        if self.known is None:
            return False
        return self.known[1].labels.get(PARENT_LABEL, self.parent) == self.parent


def layers_of(image: Image) -> list[Layer]:
    """The layers of an image, bottom first."""
    ids = image.config.diff_ids
    chains = chain_ids(ids)
    return [
        Layer(number, diff_id, chain, chains[number - 1] if number else "")
        for number, (diff_id, chain) in enumerate(zip(ids, chains, strict=True))
    ]


def missing_layers(catalog: Catalog, image: Image) -> list[str]:
    """The diff ids of layers that the store has nothing of; stubs of models are never stored."""
    ids = [
        diff_id
        for diff_id, descriptor in zip(image.config.diff_ids, image.manifest.layers, strict=True)
        if not stubs.is_annotated(descriptor)
    ]
    catalog.ensure_store()
    return [diff_id for diff_id in dict.fromkeys(ids) if catalog.layer_ref(diff_id) is None]


class Plan:
    """What is to be done for `image`; `lay_out` and `verify` as index_image takes them. What is used is protected in `session`."""

    def __init__(
        self, catalog: Catalog, image: Image, session: Session, hot: HotLayers, lay_out: str, *, verify: bool
    ) -> None:
        self._catalog, self._image, self._session, self._hot = catalog, image, session, hot
        self._lay_out, self._verify = lay_out, verify

    def to_read(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that must be read, each diff id once."""
        todo: dict[str, Layer] = {}
        for layer in layers:
            if stubs.is_annotated(self._image.manifest.layers[layer.number]):
                layer.stub = True
                continue
            layer.known = self._known(layer.diff_id)
            layer.suspect = layer.known is not None and self._is_suspect(layer.known[1])
            if self._lay_out == ALL_LAYERS and layer.fits and layer.diff_id not in todo:
                layer.hot = self._hot.files(layer.number, layer.known[1].tree.digest if layer.known else None)
                layer.again = len(layer.hot) >= LEAST
            if layer.reused:
                layer.result = layer.known
            else:
                todo.setdefault(layer.diff_id, layer)
        for layer in todo.values():
            if self._lay_out != NO_LAYERS and not layer.again:
                layer.hot = self._hot.files(layer.number, layer.known[1].tree.digest if layer.known else None)
        return list(todo.values())

    def _known(self, diff_id: str) -> tuple[str, Manifest] | None:
        """What the store has, when all of it is there and sound (packs: there): indexing again repairs a store.

        Where signatures are asked for, what is not signed is not had: whoever signs it has read it.
        """
        try:
            found = self._catalog.layer(diff_id)
            if found is None:
                return None
            store = self._catalog.store
            self._protect(diff_id, *found)
            ref = layout.layer_ref_key(diff_id)
            if Ref.decode(store.get(ref), ref).manifest != found[0]:
                return None
            decode_tree(store.get(layout.tree_key(found[1].tree.digest)), found[1].tree.digest)
            for pack in found[1].packs:
                PackIndex.decode(store.get(layout.pack_index_key(pack.id)), pack.id)
                if store.head(layout.pack_key(pack.id)).size != pack.stored_size:
                    return None
        except (NotFoundError, DamagedError, UntrustedError):
            return None
        return found

    def _protect(self, diff_id: str, digest: str, manifest: Manifest) -> None:
        packs = (layout.pack_key(pack.id) for pack in manifest.packs)
        tree = layout.tree_key(manifest.tree.digest)
        self._session.protection.protect([layout.layer_ref_key(diff_id), layout.manifest_key(digest), tree, *packs])

    def _is_suspect(self, manifest: Manifest) -> bool:
        return self._verify or any(pack.id in self._session.examiner.reported() for pack in manifest.packs)
