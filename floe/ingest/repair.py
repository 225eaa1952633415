"""Packs of the store that are damaged at rest, healed by a push that has their content at hand.

Frames of a damaged pack that do not match are made anew from the chunks that the push reads, and must come out as the pack's
index has them: then the pack is uploaded over the damaged one. Names, trees and readers' caches stay as they are, and readers
read on without a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from floe.ingest.examine import DamagedPack, Examiner, read_pack
from floe.ingest.packwriter import spool_failure
from floe.ingest.session import ChunkKey
from floe.store import layout
from floe.store.damage import settle
from floe.store.frames import encode_frame
from floe.store.ids import Buffer, digest
from floe.store.nodes import Chunk
from floe.store.objects.base import ObjectStore
from floe.store.packindex import BLOCK, ChunkEntry, PackIndex

_log = logging.getLogger(__name__)


class _Pack:
    """A damaged pack; `content` is a sparse file that gets the content of its bad frames, as far as that comes."""

    def __init__(self, found: DamagedPack, content: Path) -> None:
        self.id, self.index, self.bad = found.id, found.index, found.bad
        self.content = content
        self.taken: list[tuple[Chunk, int]] = []  # those that rely on this pack, and their blocks
        self.wanted: dict[ChunkKey, list[ChunkEntry]] = {}  # chunks in bad frames
        for entry in found.chunks:
            if touches(found.index, entry.block, entry.length, set(found.bad)):
                self.wanted.setdefault((entry.digest, entry.length), []).append(entry)


def touches(index: PackIndex, block: int, length: int, frames: Collection[int]) -> bool:
    """Whether `length` bytes of content from `block` on lie in any of these frames."""
    return any(frame in frames for frame in index.frame_range(block * BLOCK, length))


class Repairs:
    """Of damaged packs that `examiner` finds in `store`, for one ingest; `spool` is its directory.

    `verify`: look at every pack that `examine` is told of, too. What is put into `spool` is what was damaged, and one pack at
    a time. For one thread. `frames` counts those made anew, by pack.
    """

    def __init__(self, store: ObjectStore, examiner: Examiner, spool: Path, *, verify: bool = False) -> None:
        self.frames: dict[str, int] = {}
        self._store = store
        self._examiner = examiner
        self._spool = spool
        self._verify = verify
        self._seen: set[str] = set()
        self._packs: dict[str, _Pack] = {}
        for pack_id in sorted(examiner.reported()):
            self._examine(pack_id)

    def examine(self, pack_id: str) -> None:
        """The ingest builds upon this pack."""
        if self._verify:
            self._examine(pack_id)

    def _examine(self, pack_id: str) -> None:
        if pack_id in self._seen:
            return
        self._seen.add(pack_id)
        found = self._examiner.examine(pack_id)
        if found is not None:
            pack = self._packs[pack_id] = _Pack(found, self._spool / f"{pack_id}.content")
            _make_sparse(pack.content, found.index.content_size, self._spool)

    def take(self, chunk: Chunk, data: bytes) -> bool:
        """Take content that damaged frames are made of; whether the place of `chunk` is settled by `finish` only.

        That is so when it is in the damaged part of a pack.
        """
        key = (chunk.digest, chunk.length)
        relies = False
        for pack in self._packs.values():
            entries = pack.wanted.get(key, ())
            for entry in entries:
                _write_at(pack.content, entry.block * BLOCK, data, self._spool)
            if entries and chunk.pack_id == pack.id:
                pack.taken.append((chunk, chunk.block))
                relies = True
        return relies

    def finish(self) -> Iterator[tuple[Chunk, bytes]]:
        """Upload what could be healed; the chunks that rely on what could not, with their content, to be stored anew."""
        for pack in self._packs.values():
            with self._examiner.healing:
                left = set(self._heal(pack))
            if left:
                _log.warning(
                    "pack %s is still damaged in %d frames, which hold content that this push does not have",
                    pack.id,
                    len(left),
                )
            for chunk, block in pack.taken:
                if touches(pack.index, block, chunk.length, left):
                    yield chunk, _read_at(pack.content, block * BLOCK, chunk.length, self._spool)
            pack.content.unlink()
        self._packs.clear()

    def _heal(self, pack: _Pack) -> Collection[int]:
        """Upload a pack with its bad frames made anew; the frames that are damaged still."""
        made = dict(self._made(pack))
        if not made:
            return pack.bad
        path = self._spool / f"{pack.id}.stored"
        try:
            _make_sparse(path, pack.index.stored_size, self._spool)
            # What is sound is read once more, not kept meanwhile: most of a pack, as a rule.
            whole, bad = read_pack(
                self._store, pack.id, pack.index, lambda at, data: _write_at(path, at, data, self._spool)
            )
            left = [frame for frame in bad if frame not in made]
            if left and not whole:
                return pack.bad  # it would look whole afterwards
            for frame, stored in made.items():
                _write_at(path, pack.index.stored_offsets[frame], stored, self._spool)
            self._store.put_file(layout.pack_key(pack.id), path)
        finally:
            path.unlink(missing_ok=True)
        self.frames[pack.id] = len(made)
        settle(self._store, pack.id, left)
        return left

    def _made(self, pack: _Pack) -> Iterator[tuple[int, Buffer]]:
        """The bad frames whose content came, as stored."""
        for frame in pack.bad:
            length = pack.index.content_length(frame)
            content = _read_at(pack.content, frame * pack.index.frame_size, length, self._spool)
            if digest(content) == pack.index.frames[frame].digest:
                stored, entry = encode_frame(content)
                if entry == pack.index.frames[frame]:
                    yield frame, stored
                else:
                    _log.warning("frame %d of pack %s was compressed by another version of zstd", frame, pack.id)


@contextmanager
def _spooling(spool: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise spool_failure(error, spool) from error


def _make_sparse(path: Path, size: int, spool: Path) -> None:
    with _spooling(spool), path.open("xb") as file:
        file.truncate(size)


def _write_at(path: Path, offset: int, data: Buffer, spool: Path) -> None:
    with _spooling(spool), path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _read_at(path: Path, offset: int, length: int, spool: Path) -> bytes:
    with _spooling(spool), path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
