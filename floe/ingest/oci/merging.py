"""One directory of an image, put together out of its layers as overlayfs shows it. Pure."""

from __future__ import annotations

import stat
from collections.abc import Collection, Sequence

from floe.ingest.oci.layers import OPAQUE_XATTR, LayerTree, is_whiteout
from floe.store.nodes import Node


def merged_directory(layers: Sequence[LayerTree], path: str) -> Node | None:
    """What the (checked) `path` is in an image of these `layers`, bottom first; None when it is no directory at the end.

    Directories are new nodes, everything else those of the layers, so that names of one file stay that. Nothing of overlayfs is left
    in the result: no whiteouts, no opaque directories.
    """
    parts = [part.encode("utf-8", "surrogateescape") for part in path.split("/") if part]
    found: Node | None = None
    for layer in layers:
        implicit = {id(node) for _, node in layer.implicit}
        found = _over(found, layer.root, parts, implicit)
    return found


def _over(lower: Node | None, root: Node, parts: Sequence[bytes], implicit: Collection[int]) -> Node | None:
    node = root
    for part in parts:
        child = node.children.get(part)
        if child is None:
            return lower
        if not child.is_dir:
            return None
        if OPAQUE_XATTR in child.xattrs:
            lower = None
        node = child
    return _merge(lower, node, implicit)


def _merge(lower: Node | None, upper: Node, implicit: Collection[int]) -> Node:
    # A directory without an entry of its own says nothing about itself.
    like = lower if lower is not None and id(upper) in implicit else upper
    opaque = OPAQUE_XATTR in upper.xattrs
    children = dict(lower.children) if lower is not None and not opaque else {}
    for name, child in upper.children.items():
        below = children.pop(name, None)
        if is_whiteout(child):
            continue
        if child.is_dir:
            children[name] = _merge(below if below is not None and below.is_dir else None, child, implicit)
        else:
            children[name] = child
    mode = stat.S_IFDIR | stat.S_IMODE(like.mode)
    xattrs = {key: value for key, value in like.xattrs.items() if key != OPAQUE_XATTR}
    return Node(
        mode, like.uid, like.gid, like.mtime, like.mtime_ns, xattrs=xattrs, children=dict(sorted(children.items()))
    )
