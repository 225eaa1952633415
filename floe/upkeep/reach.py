"""What names lead to: manifests, trees, packs, and the advice that lies beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.chunkfinder import each
from floe.store.erofs import read_device_table
from floe.store.errors import BadInputError, FloeError
from floe.store.ids import ModelRef, is_hexdigest
from floe.store.profiles import layer_source, model_source
from floe.store.treeobject import decode_tree
from floe.upkeep.names import Names, Problem


@dataclass(frozen=True)
class Needs:
    """What a manifest or a tree needs: a `tree` (digest) and `packs` (ids)."""

    tree: str
    packs: tuple[str, ...]


@dataclass
class Reach:
    """Keys that are needed; a pack's stands for its index and chunk table. `problems`: what could not be followed."""

    keys: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


class Follower:
    """Follows names of the store of `catalog`. Manifests and trees are immutable, so each is read once; some 200 bytes are kept of it.

    Raises the store's passing errors only.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[str, Needs] = {}  # key of a manifest or a tree

    def follow(self, names: Names) -> Reach:
        """All that is needed for `names`. Layers and chains are needed by the images that have them."""
        reach = Reach(problems=list(names.problems))
        manifests, trees = set[str](), set[str]()
        for key, ref in names.models.items():
            reach.keys.add(key)
            manifests.add(ref.manifest)
        for key, image in names.images.items():
            layers = [layout.layer_ref_key(diff_id) for diff_id in image.diff_ids]
            reach.keys.update((key, *layers, *map(layout.chain_ref_key, image.chain_ids)))
            manifests.update(names.layers[layer].manifest for layer in layers if layer in names.layers)
        for key, attached in names.attachments.items():
            reach.keys.add(key)
            found = [(model.get("manifest", ""), model.get("tree", "")) for model in attached.models]
            manifests.update(manifest for manifest, _ in found if is_hexdigest(manifest))
            trees.update(tree for _, tree in found if is_hexdigest(tree))
        for needs in self._load([layout.manifest_key(digest) for digest in manifests], reach):
            reach.keys.update(_keys(needs))
        for needs in self._load([layout.tree_key(digest) for digest in trees], reach):
            reach.keys.update(_keys(needs))
        for source in sources(names):
            reach.keys.update((layout.source_profile_key(source), layout.source_layout_key(source)))
        return reach

    def _load(self, keys: Iterable[str], reach: Reach) -> list[Needs]:
        wanted = list(keys)
        reach.keys.update(wanted)
        for key, found in each(self._read, [key for key in wanted if key not in self._known]):
            if isinstance(found, FloeError):
                reach.problems.append(Problem(key, found))
            else:
                self._known[key] = found
        return [self._known[key] for key in wanted if key in self._known]

    def _read(self, key: str) -> tuple[str, Needs | FloeError]:
        try:
            digest = key.rpartition("/")[2]
            if key.startswith(f"{layout.TREES}/"):
                packs = read_device_table(decode_tree(self._catalog.store.get(key), digest), f"tree {digest}")
                return key, Needs(digest, tuple(pack_id for pack_id, _ in packs))
            manifest = self._catalog.get_manifest(digest)
            return key, Needs(manifest.tree.digest, tuple(pack.id for pack in manifest.packs))
        except FloeError as error:
            if error.retryable:
                raise
            return key, error


def sources(names: Names) -> set[str]:
    """What profiles and layouts may be of: models and image repositories that are named."""
    found = {model_source(layout.parse_model_ref_key(key).name) for key in names.models if _is_model(key)}
    for image in names.images.values():
        found.update(
            layer_source(name, image.platform, number) for name in image.names for number in range(len(image.diff_ids))
        )
    for attached in names.attachments.values():
        for model in attached.models:
            try:
                found.add(model_source(ModelRef.parse(model["name"]).name))
            except BadInputError:  # nothing that this Floe would write
                continue
    return found


def _is_model(key: str) -> bool:
    try:
        layout.parse_model_ref_key(key)
    except BadInputError:
        return False
    return True


def _keys(needs: Needs) -> list[str]:
    tree = (layout.tree_key(needs.tree), layout.tree_profile_key(needs.tree))
    return [*tree, *map(layout.pack_key, needs.packs)]
