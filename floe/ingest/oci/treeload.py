"""Trees of the store back to nodes."""

from __future__ import annotations

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs_reader import read_image
from floe.store.nodes import Node
from floe.store.records import Manifest
from floe.store.treeobject import decode_tree


def load_tree(catalog: Catalog, manifest: Manifest) -> Node:
    """The root of a manifest's tree, its chunks naming their packs. NotFoundError, DamagedError."""
    digest = manifest.tree.digest
    return read_image(decode_tree(catalog.store.get(layout.tree_key(digest)), digest), f"tree {digest}")
