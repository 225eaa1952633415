"""What of a store's packs each model or layer needs alone, and what it shares with others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from floe.store.catalog import Catalog
from floe.store.chunkfinder import each
from floe.store.errors import FloeError
from floe.store.records import Manifest
from floe.upkeep.names import NameReader
from floe.upkeep.users import Users


@dataclass(frozen=True)
class Sharing:
    """Stored bytes of a manifest's packs: `unique` are those of packs that no other manifest that is named needs."""

    unique: int
    shared: int


def sharing(catalog: Catalog) -> dict[str, Sharing]:
    """Of every manifest that a model, a layer or an attachment names, by digest; one that cannot be read is left out.

    Reads every name and manifest of the store. Raises the store's passing errors.
    """

    def read(digest: str) -> Manifest | None:
        try:
            return catalog.get_manifest(digest)
        except FloeError as error:
            if error.retryable:
                raise
            return None

    digests = sorted(Users(NameReader(catalog.store).read()).manifests)
    found = {manifest.digest: manifest for manifest in each(read, digests) if manifest is not None}
    uses = Counter(pack_id for manifest in found.values() for pack_id in {pack.id for pack in manifest.packs})
    made = {}
    for digest, manifest in found.items():
        sizes = {pack.id: pack.stored_size for pack in manifest.packs}
        unique = sum(size for pack_id, size in sizes.items() if uses[pack_id] == 1)
        made[digest] = Sharing(unique, sum(sizes.values()) - unique)
    return made
