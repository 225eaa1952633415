"""Checking a node's cache: every frame that it vouches for is hashed again, beside a pack filesystem that may be at work."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from floe.store.cache import CacheWriter, NodeCache
from floe.store.cache.bitmap import Bitmap
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import digest, is_hexdigest
from floe.store.packindex import PackIndex
from floe.store.progress import Progress


@dataclass
class BadPack:
    """A pack of the cache with bad `frames`. `dropped`: they were taken away, and are fetched anew when they are read."""

    id: str
    frames: tuple[int, ...]
    dropped: bool = False


@dataclass
class CacheChecked:
    """How many packs and frames were looked at, and what of them is bad. `unread`: packs whose index or bitmap says nothing."""

    packs: int = 0
    frames: int = 0
    read_bytes: int = 0
    unread: int = 0
    bad: list[BadPack] = field(default_factory=list)

    def add(self, other: CacheChecked) -> None:
        """What was found in another directory of the cache."""
        self.packs += other.packs
        self.frames += other.frames
        self.read_bytes += other.read_bytes
        self.unread += other.unread
        self.bad += other.bad


def check_cache(root: Path, progress: Progress | None = None) -> CacheChecked:
    """Hash all frames that the cache in `root` may serve without hashing. Changes nothing; holds a frame. OSError."""
    packs = root / "packs"
    names = sorted(entry.name for entry in packs.iterdir() if is_hexdigest(entry.name)) if packs.is_dir() else []
    done = CacheChecked()
    found = [(name, _index(packs / name, name)) for name in names]
    if progress is not None:
        progress.total(sum(_held(packs / name, index) for name, index in found if index is not None))
    for name, index in found:
        done.packs += 1
        if index is None:
            done.unread += 1
            continue
        bad = _check(packs / name, index, done, progress)
        if bad:
            done.bad.append(BadPack(name, tuple(bad)))
    return done


def drop_bad(cache: NodeCache, checked: CacheChecked) -> None:
    """Take bad frames away. BusyError while a pack filesystem, or a portable mount, writes to the cache."""
    if not checked.bad:
        return
    with closing(CacheWriter(cache)) as writer:
        for pack in checked.bad:
            pack.dropped = writer.discard(pack.id, list(pack.frames))


def _index(folder: Path, pack_id: str) -> PackIndex | None:
    try:
        return PackIndex.decode((folder / "index").read_bytes(), pack_id)
    except (FileNotFoundError, DamagedError, UnsupportedError):
        return None


def _trusted(folder: Path, index: PackIndex) -> list[int]:
    """Frames that are served as they are; those to be hashed first are no matter."""
    if (folder / "complete").exists():
        return list(range(len(index.frames)))
    try:
        bits = Bitmap.decode((folder / "bitmap").read_bytes())
    except FileNotFoundError:
        return []
    if bits is None or (bits.frame_size, bits.content_size) != (index.frame_size, index.content_size):
        return []
    return [frame for frame in range(bits.count) if bits.is_trusted(frame)]


def _held(folder: Path, index: PackIndex) -> int:
    return sum(map(index.content_length, _trusted(folder, index)))


def _check(folder: Path, index: PackIndex, done: CacheChecked, progress: Progress | None) -> list[int]:
    bad: list[int] = []
    try:
        data = os.open(folder / "data", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return bad
    try:
        for frame in _trusted(folder, index):
            done.frames += 1
            length = index.content_length(frame)
            if not _matches(data, index, frame):
                bad.append(frame)
            done.read_bytes += length
            if progress is not None:
                progress.advance(length)
        # A frame that was evicted meanwhile lost its bit before its content; one that was fetched anew is good by now.
        still = set(_trusted(folder, index)) if bad else set()
        return [frame for frame in bad if frame in still and not _matches(data, index, frame)]
    finally:
        os.close(data)


def _matches(data: int, index: PackIndex, frame: int) -> bool:
    content = os.pread(data, index.content_length(frame), frame * index.frame_size)
    return digest(content) == index.frames[frame].digest
