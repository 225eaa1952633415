"""What the write path is given: trees of nodes, and how one tree is placed at a path inside another."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass

from floe.store.errors import BadInputError
from floe.store.nodes import Chunk, FileContent, Node, chunk_bits, find, link_counts, walk
from floe.store.records import Sizes

__all__ = [
    "Chunk",
    "FileContent",
    "Node",
    "chunk_bits",
    "find",
    "link_counts",
    "mtime_parts",
    "place_tree",
    "tree_sizes",
    "walk",
]

_PARENT = Node(stat.S_IFDIR | 0o755, mtime_ns=1)
_NS = 10**9


def mtime_parts(mtime_ns: int) -> tuple[int, int]:
    """st_mtime_ns as (whole seconds, nanoseconds after them), right for times before 1970 too."""
    return divmod(mtime_ns, _NS)


def place_tree(root: Node, path: str, parents: Mapping[str, Node] | None = None) -> Node:
    """A new tree in which `root` is found at `path` (absolute, `/opt/model`); `root` itself is shared, not copied.

    `parents` gives nodes whose mode, owner, times and xattrs the directories above take, by their path (`/`,
    `/opt`); others are 0755, root's, with a fixed time. BadInputError: `path` is relative, `/`, or holds `.`, `..`.
    """
    names = [name for name in path.split("/") if name]
    if not path.startswith("/") or not names or any(name in (".", "..") for name in names) or "\0" in path:
        raise BadInputError(f"{path!r} is no place for a model", hint="give an absolute path such as /opt/model")
    given = {"/" + "/".join(n for n in key.split("/") if n): node for key, node in (parents or {}).items()}
    top = _like(given.get("/", _PARENT))
    here = top
    for depth, name in enumerate(names[:-1], 1):
        below = _like(given.get("/" + "/".join(names[:depth]), _PARENT))
        here.children[_name(name)] = below
        here = below
    here.children[_name(names[-1])] = root
    return top


def _like(node: Node) -> Node:
    mode = stat.S_IFDIR | stat.S_IMODE(node.mode)
    return Node(mode, node.uid, node.gid, node.mtime, node.mtime_ns, xattrs=dict(node.xattrs))


def _name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > 255:
        raise BadInputError(f"{name!r} is longer than the 255 bytes a file name can have")
    return raw


@dataclass(slots=True)
class _Count:
    files: int = 0
    inodes: int = 0
    content: int = 0


def tree_sizes(root: Node) -> Sizes:
    """What a manifest says of a tree; each hard link counts once."""
    seen: set[int] = set()
    count = _Count()
    for _, node in walk(root):
        if id(node) in seen:
            continue
        seen.add(id(node))
        count.inodes += 1
        if node.is_file:
            count.files += 1
            count.content += node.size
    return Sizes(count.files, count.inodes, count.content)
