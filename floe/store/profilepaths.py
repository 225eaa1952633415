"""Between reads of packs and files of a tree, either way: what a profile needs of the tree's EROFS image. Pure.

Packs hold the content of several trees, and one frame that of many small files, so only what belongs to a file of the
tree counts as touched by its users.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from floe.store.erofs_inodes import Extent, Inode, Inodes
from floe.store.errors import FloeError
from floe.store.nodes import blocks
from floe.store.profile import PATH_MAX, PIECE, Frame, Piece


class Read(NamedTuple):
    """`length` bytes at `offset` of a pack's content, read `first` ms after the tree's first read."""

    pack_id: str
    offset: int
    length: int
    first: int


class Touched(NamedTuple):
    """What reads touched, each with its first touch in ms."""

    frames: dict[Frame, int]
    pieces: dict[Piece, int]


def touched(
    image: Inodes, reads: Iterable[Read], frame_sizes: Mapping[str, int], pause: Callable[[], object] = lambda: None
) -> Touched:
    """What of the tree in `image` the `reads` touched. `frame_sizes`: bytes, by pack.

    Looks at every inode, some 5 microseconds each; `pause` is called now and then. Content under several names counts
    for the first of them.
    """
    spans = {pack_id: _Spans(found) for pack_id, found in _by_pack(reads).items()}
    numbers = {pack_id: number for number, (pack_id, _) in enumerate(image.packs)}
    found = Touched({}, {})
    seen: set[tuple[str, int]] = set()
    for path, inode in files(image, pause):
        if len(path) > PATH_MAX or not inode.size:
            continue
        bits = image.chunk_bits(inode)
        for number, chunk in enumerate(image.chunks(inode, 0, -(-inode.size >> bits))):
            if chunk.pack not in spans or chunk.pack not in frame_sizes or (chunk.pack, chunk.offset) in seen:
                continue
            parts = list(spans[chunk.pack].within(chunk.offset, chunk.offset + chunk.length))
            if parts:
                seen.add((chunk.pack, chunk.offset))
            for start, stop, first in parts:
                size = frame_sizes[chunk.pack]
                for frame in range(start // size, (stop - 1) // size + 1):
                    _earliest(found.frames, (numbers[chunk.pack], frame), first)
                base = (number << bits) - chunk.offset
                for piece in range((base + start) // PIECE, (base + stop - 1) // PIECE + 1):
                    _earliest(found.pieces, (path, piece), first)
    return found


def locate(image: Inodes, pieces: Iterable[Piece], prefix: bytes = b"") -> Iterator[Extent]:
    """Where pieces of files, by paths below `prefix`, lie in this tree, in the same order; what it has not is left out."""
    directories: dict[bytes, Inode | None] = {b"": image.inode(image.superblock.root_nid)}
    files: dict[bytes, Inode | None] = {}
    for path, piece in pieces:
        whole = prefix + path
        if whole not in files:
            files[whole] = _file(image, whole, directories)
        inode = files[whole]
        if inode is not None:
            yield from (extent for extent in image.extents(inode, piece * PIECE, PIECE) if extent.pack is not None)


def files(image: Inodes, pause: Callable[[], object]) -> Iterator[tuple[bytes, Inode]]:
    """Every regular file and its path, a file of several names once; `pause` is called now and then."""
    seen: set[int] = set()
    pending = [(b"", image.superblock.root_nid)]
    while pending:
        path, nid = pending.pop()
        if nid in seen:
            continue  # a damaged image may have circles
        seen.add(nid)
        directory = image.inode(nid)
        prefix = path + b"/" if path else b""
        for number in range(blocks(directory.size)):
            pause()
            for name, child, kind, _ in image.block_entries(directory, number):
                if kind == stat.S_IFDIR:
                    if name not in (b".", b".."):
                        pending.append((prefix + name, child))
                elif kind == stat.S_IFREG and child not in seen:
                    seen.add(child)
                    yield prefix + name, image.inode(child)


class _Spans:
    """The parts of a pack that were read, apart from each other and in order."""

    def __init__(self, reads: list[Read]) -> None:
        self._starts: list[int] = []
        self._spans: list[tuple[int, int, int]] = []
        end = 0
        for _, offset, length, first in sorted(reads, key=lambda read: (read.offset, read.first)):
            start, stop = max(offset, end), offset + length
            if start < stop:
                self._starts.append(start)
                self._spans.append((start, stop, first))
                end = stop

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, first touch) of what was read of [start, stop)."""
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self._spans)):
            begin, end, first = self._spans[number]
            if begin >= stop:
                return
            if end > start:
                yield max(begin, start), min(end, stop), first


def _by_pack(reads: Iterable[Read]) -> dict[str, list[Read]]:
    found: dict[str, list[Read]] = {}
    for read in reads:
        found.setdefault(read.pack_id, []).append(read)
    return found


def _earliest(found: dict, key: object, first: int) -> None:  # type: ignore[type-arg]  # of either kind
    known = found.get(key)
    if known is None or first < known:
        found[key] = first


def _file(image: Inodes, path: bytes, directories: dict[bytes, Inode | None]) -> Inode | None:
    parent, _, name = path.rpartition(b"/")
    try:
        inode = _child(image, _directory(image, parent, directories), name)
    except FloeError:
        return None
    return inode if inode is not None and stat.S_ISREG(inode.mode) and inode.size else None


def _directory(image: Inodes, path: bytes, directories: dict[bytes, Inode | None]) -> Inode | None:
    missing = []  # from the inside out: a path may have more parts than a stack has frames
    while path not in directories:
        missing.append(path)
        path = path.rpartition(b"/")[0]
    for inner in reversed(missing):
        found = _child(image, directories[path], inner.rpartition(b"/")[2])
        directories[inner] = found if found is not None and stat.S_ISDIR(found.mode) else None
        path = inner
    return directories[path]


def _child(image: Inodes, directory: Inode | None, name: bytes) -> Inode | None:
    if directory is None or not name:
        return None
    nid = image.lookup(directory, name)
    return None if nid is None else image.inode(nid)
