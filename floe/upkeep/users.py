"""Who uses an object of a store: the models, images and layers that lead to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from floe.store import layout
from floe.store.errors import BadInputError
from floe.store.ids import is_hexdigest, is_oci_digest
from floe.store.records import ImageRecord, Manifest
from floe.upkeep.names import Names


@dataclass(frozen=True)
class Found:
    """Names of models, names (else digests) of images, diff ids of layers, each sorted."""

    models: tuple[str, ...]
    images: tuple[str, ...]
    layers: tuple[str, ...]


class Users:
    """The users that `names` tell. `manifests` and `trees` are those that are named; `packs_of` a tree its reader fills in."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.packs_of: dict[str, tuple[str, ...]] = {}
        self.manifests = {ref.manifest for ref in (*names.models.values(), *names.layers.values())}
        self.trees = set[str]()
        for attached in names.attachments.values():
            for model in attached.models:
                self.manifests.update(digest for digest in (model.get("manifest", ""),) if is_hexdigest(digest))
                self.trees.update(digest for digest in (model.get("tree", ""),) if is_hexdigest(digest))

    def of(self, key: str, manifests: Mapping[str, Manifest]) -> Found:
        """The users of the object at `key`. `manifests`: those that could be read, by digest."""
        name = key.rpartition("/")[2]
        if key.startswith("refs/"):
            return self._of_record(key)
        if key.startswith(f"{layout.MANIFESTS}/"):
            return self._found({name}, set())
        if key.startswith(f"{layout.TREES}/"):
            return self._found({d for d, m in manifests.items() if m.tree.digest == name}, {name})
        trees = {tree for tree, packs in self.packs_of.items() if name in packs}
        using = {d for d, m in manifests.items() if any(pack.id == name for pack in m.packs)}
        return self._found(using, trees)

    def _found(self, manifests: set[str], trees: set[str]) -> Found:
        names = self._names
        models = {_model(key) for key, ref in names.models.items() if ref.manifest in manifests}
        layers = {_diff_id(key) for key, ref in names.layers.items() if ref.manifest in manifests}
        images = {_shown(image) for image in names.images.values() if not layers.isdisjoint(image.diff_ids)}
        for attached in names.attachments.values():
            for model in attached.models:
                if model.get("manifest") in manifests or model.get("tree") in trees:
                    images.add(attached.target)
                    models.add(model["name"])
        return Found(tuple(sorted(models)), tuple(sorted(images)), tuple(sorted(layers)))

    def _of_record(self, key: str) -> Found:
        name = f"sha256:{key.rpartition('/')[2]}"
        if key.startswith(f"{layout.MODEL_REFS}/"):
            return Found((_model(key),), (), ())
        if key.startswith((f"{layout.IMAGE_REFS}/", f"{layout.ATTACHMENT_REFS}/")):
            image = self._names.images.get(layout.image_ref_key(name)) if is_oci_digest(name) else None
            return Found((), (_shown(image) if image else name,), ())
        of_chain = key.startswith(f"{layout.CHAIN_REFS}/")
        images = [i for i in self._names.images.values() if name in (i.chain_ids if of_chain else i.diff_ids)]
        layers = {i.diff_ids[i.chain_ids.index(name)] for i in images} if of_chain else {name}
        return Found((), tuple(sorted(map(_shown, images))), tuple(sorted(layers)))


def _model(key: str) -> str:
    try:
        return str(layout.parse_model_ref_key(key))
    except BadInputError:
        return key


def _diff_id(key: str) -> str:
    return f"sha256:{key.rpartition('/')[2]}"


def _shown(image: ImageRecord) -> str:
    return ", ".join(image.names) or image.manifest_digest
