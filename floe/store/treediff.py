"""How two trees differ, path by path, and how much content they have in common. Nothing of their content is read.

Content at one place of one pack is the same. At different places it is compared by the digests in the packs' chunk tables,
which their pack ids vouch for.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from floe.store.erofs_inodes import Inode, Inodes
from floe.store.packindex import BLOCK

ADDED, REMOVED, CHANGED, ATTRIBUTES = "added", "removed", "changed", "attributes"
Digests: TypeAlias = Callable[[str], Mapping[int, bytes]]
"""Of a pack: the digests of its chunks, by the first block of each."""
_Chunk: TypeAlias = "tuple[object, int]"  # what it is, and its bytes


@dataclass(frozen=True)
class Change:
    """What happened to `path` (bytes, relative to the root), with sizes in bytes before and after, None where it is not there.

    CHANGED: content, kind or a symlink's target; ATTRIBUTES: mode, owner, time or extended attributes alone.
    """

    path: bytes
    change: str
    before: int | None
    after: int | None


@dataclass
class Difference:
    """`changes` in the order of paths. Of distinct content, in bytes: `shared`, `only_before` and `only_after`."""

    changes: list[Change] = field(default_factory=list)
    same: int = 0
    shared: int = 0
    only_before: int = 0
    only_after: int = 0


class _Tree:
    def __init__(self, image: Inodes, digests: Digests) -> None:
        self.image = image
        self._digests = digests
        self._tables: dict[str, Mapping[int, bytes]] = {}
        self.entries = dict(_walk(image))

    def chunks(self, inode: Inode) -> list[_Chunk]:
        """What a file's content is, chunk by chunk: a digest; a place where no table tells; None for a hole."""
        if not inode.size:
            return []
        bits = self.image.chunk_bits(inode)
        found: list[_Chunk] = []
        for extent in self.image.chunks(inode, 0, -(-inode.size >> bits)):
            if extent.pack is None:
                found.append((None, extent.length))
                continue
            if extent.pack not in self._tables:
                self._tables[extent.pack] = self._digests(extent.pack)
            block = extent.offset // BLOCK
            found.append((self._tables[extent.pack].get(block, (extent.pack, block)), extent.length))
        return found


def compare(before: Inodes, after: Inodes, digests: Digests) -> Difference:
    """Compare two trees. DamagedError, and what `digests` raises."""
    old, new = _Tree(before, digests), _Tree(after, digests)
    found = Difference()
    for path in sorted(old.entries.keys() | new.entries.keys()):
        one, other = old.entries.get(path), new.entries.get(path)
        if one is None or other is None:
            change = ADDED if one is None else REMOVED
        elif _differs(old, one, new, other):
            change = CHANGED
        elif _attributes(old, one) != _attributes(new, other):
            change = ATTRIBUTES
        else:
            found.same += 1
            continue
        found.changes.append(Change(path, change, _size(one), _size(other)))
    of_old, of_new = _content(old), _content(new)
    found.shared = sum(length for _, length in of_old & of_new)
    found.only_before = sum(length for _, length in of_old - of_new)
    found.only_after = sum(length for _, length in of_new - of_old)
    return found


def _walk(image: Inodes) -> list[tuple[bytes, Inode]]:
    found, pending, seen = [], [(b"", image.superblock.root_nid)], set[int]()
    while pending:
        path, nid = pending.pop()
        if nid in seen:
            raise image.damaged(f"directory {nid} has two places")
        seen.add(nid)
        for entry in image.entries(image.inode(nid)):
            if entry.name in (b".", b".."):
                continue
            below = path + b"/" + entry.name if path else entry.name
            found.append((below, image.inode(entry.nid)))
            if entry.kind == stat.S_IFDIR:
                pending.append((below, entry.nid))
    return found


def _differs(old: _Tree, one: Inode, new: _Tree, other: Inode) -> bool:
    if stat.S_IFMT(one.mode) != stat.S_IFMT(other.mode):
        return True
    if stat.S_ISREG(one.mode):
        return one.size != other.size or old.chunks(one) != new.chunks(other)
    if stat.S_ISLNK(one.mode):
        return old.image.link(one) != new.image.link(other)
    return False


def _attributes(tree: _Tree, inode: Inode) -> tuple[object, ...]:
    return inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_ns, tree.image.xattrs(inode)


def _size(inode: Inode | None) -> int | None:
    return None if inode is None else 0 if stat.S_ISDIR(inode.mode) else inode.size


def _content(tree: _Tree) -> set[_Chunk]:
    files = {inode.nid: inode for inode in tree.entries.values() if stat.S_ISREG(inode.mode)}
    return {chunk for inode in files.values() for chunk in tree.chunks(inode) if chunk[0] is not None}
