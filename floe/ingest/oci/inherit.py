"""Directories that a layer's archive has no entry for: which attributes they show above given lower layers.

containerd copies them from the topmost lower layer that has the directory when it applies a layer (mkparent in
archive/tar.go); without that, a layer holding only `tmp/x` would turn `/tmp` into 0755. It looks each layer up by itself,
through that layer's symlinks: below `lib -> usr/lib` a layer that holds only `lib/x` takes after `usr/lib`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from floe.ingest.oci import layers
from floe.ingest.oci.links import Steps, follow
from floe.store.errors import UnsupportedError
from floe.store.nodes import Node

_TRUSTED = b"trusted."


def inherit(implicit: Iterable[tuple[bytes, Node]], lower: Sequence[Callable[[], Node]], what: str) -> None:
    """Give each (path, directory) its mode, owner, times and xattrs from `lower`: roots of layers, topmost first.

    UnsupportedError, with `what` for the layer: the symlinks below lead its names further than STEPS_MAX, or to more
    attributes than METADATA_MAX.
    """
    held = 0
    steps = Steps(what)
    for path, node in implicit:
        for root in lower:
            found, left = follow(root(), path.split(b"/"), steps, last=True)
            if left and found.is_dir:
                continue  # this layer has no such name
            if found.is_dir:  # else it, or what was above it, was replaced or deleted, and is made anew
                held += layers.xattrs_cost(found.xattrs)  # one directory below may be found under many names
                if held > layers.METADATA_MAX:
                    raise UnsupportedError(
                        f"{what} takes more than {layers.METADATA_MAX >> 20} MiB of attributes from directories of lower layers",
                        hint="build the image again, with entries for all directories",
                    )
                copy_attributes(found, node)
            break


def copy_attributes(source: Node, target: Node) -> None:
    """Mode, owner, times, and xattrs but for those overlayfs keeps in `trusted.`."""
    target.mode, target.uid, target.gid = source.mode, source.uid, source.gid
    target.mtime, target.mtime_ns = source.mtime, source.mtime_ns
    target.xattrs.update({k: v for k, v in source.xattrs.items() if not k.startswith(_TRUSTED)})
