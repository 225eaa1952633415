"""What start-up profiles say of an image's layers when these are stored, and what is said of them afterwards."""

from __future__ import annotations

from floe.ingest.hotfiles import HotFiles
from floe.ingest.oci.source import Image
from floe.ingest.packinfo import PackInfo
from floe.ingest.session import ChunkKey
from floe.store.catalog import Catalog
from floe.store.errors import FloeError
from floe.store.hotlayout import HotLayouts
from floe.store.index.base import ChunkPlace
from floe.store.profiles import ProfileStore, layer_source


class HotLayers:
    """Of `image`; `packs` knows which packs of the store are whole. Thread-safe but for `warnings`, which are for people."""

    def __init__(self, catalog: Catalog, image: Image, packs: PackInfo) -> None:
        self.warnings: list[str] = []
        self._image = image
        self._packs = packs
        self._profiles = ProfileStore(catalog)
        self._layouts = HotLayouts(catalog)

    def files(self, number: int, tree: str | None) -> HotFiles:
        """What starts read of layer `number`, stored as `tree` before, or else of its predecessors; nothing fails for it."""
        try:
            known = self._profiles.of_tree(tree) if tree else None
            if known is None or not known.starts:
                known = self._profiles.of_source(self._source(number))
        except FloeError as error:
            self.warnings.append(f"{self._image.layer_name(number)} is stored without its start-up profile: {error}")
            return HotFiles()
        return HotFiles(known.hot_pieces() if known else ())

    def places(self, number: int) -> dict[ChunkKey, ChunkPlace]:
        """Where hot content was laid out for the layer's predecessors."""
        found = self._layouts.places(self._source(number))
        whole = {pack_id: self._packs.find(pack_id) is not None for pack_id in {p.pack_id for p in found.values()}}
        return {key: place for key, place in found.items() if whole[place.pack_id]}

    def published(self, number: int, tree: str, packs: tuple[str, ...], before: str | None) -> None:
        """Layer `number` is `tree` now, with hot content in `packs`; `before`: the tree it was until it was laid out anew."""
        source = self._source(number)
        if packs:
            self._layouts.put(source, packs)
        self._profiles.seed(tree, source, of=before)

    def _source(self, number: int) -> str:
        return layer_source(self._image.name, str(self._image.platform), number)
