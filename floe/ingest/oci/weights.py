"""Which directories of an image hold large files: what `floe image detach --directory` is for. Only headers are read, nothing is stored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from floe.ingest.oci import carried
from floe.ingest.oci.attach import image_layers
from floe.ingest.oci.merging import merged_directory
from floe.ingest.oci.opening import open_source
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import resolve
from floe.store.catalog import Catalog
from floe.store.ids import check_text
from floe.store.nodes import walk
from floe.store.progress import Progress


@dataclass(frozen=True)
class Heavy:
    """A directory's absolute `path`, and of the large files right in it the number and the bytes; each hard link counts once."""

    path: str
    files: int
    size: int


def find_weights(
    catalog: Catalog,
    source: str,
    least: int,
    *,
    platform: str | None = None,
    plain_http: bool = False,
    registry_config: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Heavy]:
    """Directories of the image `source` with files of at least `least` bytes, the heaviest first.

    What upper layers replaced or deleted is not counted, nor what models the image carries. `progress` counts bytes of layer blobs. Raises the store's errors.
    """
    check_text(source, "image")
    with contextlib.closing(open_source(source, plain_http=plain_http, registry_config=registry_config)) as found:
        image = resolve(found, Platform.parse(platform) if platform else None)
        stubs = {one.number for one in carried.carried_models(image)}
        layers = list(image_layers(catalog, image, stubs, progress))[::-1]
    root = merged_directory(layers, "/")
    totals: dict[bytes, tuple[int, int]] = {}
    seen = set[int]()
    for path, node in walk(root) if root is not None else ():
        if node.is_file and node.size >= least and id(node) not in seen:
            seen.add(id(node))
            parent = b"/" + path.strip(b"/").rpartition(b"/")[0]
            files, size = totals.get(parent, (0, 0))
            totals[parent] = (files + 1, size + node.size)
    heavy = [Heavy(os.fsdecode(path), files, size) for path, (files, size) in totals.items()]
    return sorted(heavy, key=lambda one: (-one.size, one.path))
