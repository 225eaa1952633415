"""What the store keeps of images with models: their attachment records, which keep the models' content from gc.

A record that named content which is not there would stop every collection, so only what this store has is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from floe.ingest.oci.carried import Carried
from floe.ingest.oci.derived import Edited
from floe.ingest.oci.source import Image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, NotFoundError, UnsupportedError
from floe.store.protection import Protection
from floe.store.records import AttachmentRecord, Manifest
from floe.store.stub import Marker


@dataclass(frozen=True)
class Kept:
    """Of the models that an image carries those that this store has; `warnings` name the others."""

    markers: tuple[Marker, ...]
    warnings: tuple[str, ...]


def protect(protection: Protection, digest: str, manifest: Manifest, *trees: str) -> None:
    """A model's content, and these placed trees of it, stay from now on; what went before that is seen by looking."""
    packs = (layout.pack_key(pack.id) for pack in manifest.packs)
    keys = map(layout.tree_key, (manifest.tree.digest, *trees))
    protection.protect((layout.manifest_key(digest), *keys, *packs))


def keep(catalog: Catalog, protection: Protection, carried: Sequence[Carried]) -> Kept:
    """Protect the content of models that an image carries already, until a record says that they are needed."""
    markers, warnings = [], []
    for found in carried:
        marker = found.marker
        try:
            protect(protection, marker.manifest, catalog.get_manifest(marker.manifest), marker.tree)
            catalog.get_manifest(marker.manifest)
            catalog.store.head(layout.tree_key(marker.tree))
        except (NotFoundError, DamagedError, UnsupportedError) as error:
            warnings.append(
                f"{marker.model} at {marker.path}, which the image carries already, cannot be had from this store "
                f"({error}): nodes that use this store cannot start the image; detach it, or push and attach it again"
            )
        else:
            markers.append(marker)
    return Kept(tuple(markers), tuple(warnings))


def record(catalog: Catalog, target: str, image: Image, markers: Sequence[Marker]) -> None:
    """Say that the image with the manifest digest `target`, made out of `image`, needs these models."""
    digest = image.source.digest if isinstance(image.source, Edited) else image.manifest.digest
    record_models(catalog, target, f"{image.name} ({digest})", markers)


def record_models(catalog: Catalog, target: str, source: str, markers: Sequence[Marker]) -> None:
    """The same of an image made out of `source`, as people read it."""
    models = tuple({"name": m.model, "manifest": m.manifest, "tree": m.tree, "path": m.path} for m in markers)
    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    catalog.set_attachment(AttachmentRecord(target, source, models, created))
