"""Where models go inside an image: which paths are allowed, and what the image has there and above."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from floe.ingest.oci.layers import OPAQUE_XATTR, LayerTree, is_whiteout
from floe.store.errors import BadInputError
from floe.store.ids import check_text
from floe.store.nodes import Node

ROOT = "/"
"""Where a model lies that is an image of its own: nothing else has a place beside it."""
_RESERVED = ("/.floe", "/proc", "/sys", "/dev")


def check_path(path: str) -> str:
    """`path` in its one spelling; BadInputError unless it is absolute, below `/`, and says no `.` or `..`."""
    check_text(path, "path")
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or not parts or "\0" in path or any(part in (".", "..") for part in parts):
        raise BadInputError(f"{path!r} is no place for a model", hint="give an absolute path such as /opt/model")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 or part.startswith(".wh.") for part in parts):
        raise BadInputError(f"{path!r} holds a name that a layer cannot: too long, or one that begins with '.wh.'")
    clean = "/" + "/".join(parts)
    if any(within(clean, place) for place in _RESERVED):
        raise BadInputError(f"a model cannot be placed at {clean}", hint="give another path such as /opt/model")
    return clean


def check_apart(paths: Iterable[str]) -> None:
    """BadInputError when one of these (checked) paths is another, or lies below it."""
    known: list[str] = []
    for path in paths:
        for other in known:
            if within(path, other) or within(other, path):
                raise BadInputError(f"models at {other} and {path} would hide one another", hint="use separate paths")
        known.append(path)


def parents_of(path: str) -> list[str]:
    """The directories above `path`, topmost first, without `/`."""
    parts = path.strip("/").split("/")
    return ["/" + "/".join(parts[:depth]) for depth in range(1, len(parts))]


@dataclass
class _Search:
    """Looks for one directory, layer by layer from the top, as overlayfs would."""

    path: str
    done: bool = False
    found: Node | None = None
    known: int = 0  # components that upper layers have as directories

    def look(self, layer: LayerTree, implicit: set[int], image: str) -> None:
        node = layer.root
        parts = self.path.encode("utf-8", "surrogateescape").strip(b"/").split(b"/")
        covered = False
        for depth, part in enumerate(parts, 1):
            child = node.children.get(part)
            if child is None:
                self.done = self.done or covered
                return
            if not child.is_dir:
                self.done = True
                if depth > self.known and not is_whiteout(child):
                    where = "/" + b"/".join(parts[:depth]).decode("utf-8", "backslashreplace")
                    kind = "a symlink" if stat.S_ISLNK(child.mode) else "no directory"
                    raise BadInputError(
                        f"{self.path} cannot hold a model: in {image}, {where} is {kind}",
                        hint="give the path behind the symlink, or another one",
                    )
                return
            self.known = max(self.known, depth)
            covered = covered or OPAQUE_XATTR in child.xattrs
            node = child
        self.found = self.found or node
        # A directory without an entry of its own shows what lower layers say.
        self.done = id(node) not in implicit or covered
        if self.done:
            self.found = node


def look_up(paths: Sequence[str], layers: Iterable[LayerTree], image: str) -> dict[str, Node]:
    """Those of `paths` that the image has as directories, and their nodes. `layers` topmost first, read as needed.

    BadInputError when a path leads through a symlink or a file.
    """
    searches = [_Search(path) for path in dict.fromkeys(paths)]
    for layer in layers:
        implicit = {id(node) for _, node in layer.implicit}
        for search in searches:
            if not search.done:
                search.look(layer, implicit, image)
        if all(search.done for search in searches):
            break
    return {search.path: search.found for search in searches if search.found is not None}


def within(path: str, place: str) -> bool:
    """Whether the (checked) `path` is `place` or lies below it."""
    return place in (path, ROOT) or path.startswith(place + "/")
