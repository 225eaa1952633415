"""A tree to the store, once all of its content is there: planned, written, read back, put."""

from __future__ import annotations

from collections.abc import Callable

from floe.ingest.entries import Node, walk
from floe.ingest.erofs_writer import plan_image, write_image
from floe.ingest.packinfo import PackInfo
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs import read_device_table
from floe.store.errors import UnavailableError
from floe.store.ids import hexdigest
from floe.store.objects.base import ObjectStore
from floe.store.protection import Protection
from floe.store.treeobject import decode_tree, encode_tree


def publish_tree(catalog: Catalog, root: Node, protection: Protection) -> str:
    """Store the tree of nodes whose chunks are in the store already (a model placed at a path); its digest.

    It is protected, and its packs are, until `protection` ends. DamagedError when a pack it needs is not in the store.
    """
    image, _ = make_image(root, PackInfo(catalog.store, protection).blocks)
    tree = hexdigest(image)
    protection.protect((layout.tree_key(tree),))
    put_tree(catalog.store, image, tree)
    return tree


def make_image(root: Node, content_blocks: Callable[[str], int]) -> tuple[bytes, list[str]]:
    """(EROFS image, a warning for each thing left out); `content_blocks`: of a pack, by its id."""
    used = {c.pack_id for _, node in walk(root) if node.content for c in node.content.chunks if c is not None}
    plan = plan_image(root, {pack_id: content_blocks(pack_id) for pack_id in used})
    image = write_image(plan)
    if read_device_table(image) != plan.packs:
        raise UnavailableError("the tree was not written as planned", hint="try again; check this machine")
    return image, plan.warnings


def put_tree(store: ObjectStore, image: bytes, tree: str) -> None:
    """Store the image whose digest is `tree`."""
    data = encode_tree(image)
    decode_tree(data, tree)  # what a reader will see must be what was meant
    store.put(layout.tree_key(tree), data)
