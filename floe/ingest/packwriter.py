"""Chunks to packs: spooled to local disk frame by frame, sealed, then handed on for upload.

A pack has two sections. Chunks of exactly 4 MiB go to the first, so each starts on a multiple of 4 MiB; tails and
small files go to the second, each on the next 4 KiB block. Since the first section's size is a multiple of 4 MiB, and so
of every frame size, both are cut into frames on their own and joined when the pack is sealed.

One thread calls a PackWriter; frames are hashed and compressed in the pool. At most `_PENDING` bytes of content a
section wait for it. Equal chunks added in equal order give equal packs, as long as the spool has room: when packs of several
writers fill it, one is sealed before it is full.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from floe.store.copyrange import copy_range
from floe.store.errors import FloeError, NoSpaceError, UnavailableError
from floe.store.frames import encode_frames
from floe.store.ids import Buffer, digest
from floe.store.nodes import CHUNK, Chunk, blocks
from floe.store.packindex import (
    BLOCK,
    MAX_CONTENT,
    MAX_FRAME,
    ChunkEntry,
    FrameEntry,
    PackIndex,
    decode_chunk_table,
    encode_chunk_table,
)

_TASK = MAX_FRAME  # bytes of content that are encoded at a time: of every frame size a multiple
_PENDING = 8 << 20  # bytes of content of a section that wait to be encoded or written
_JOIN = 16 << 20  # bytes moved at a time when sections are joined


@dataclass(frozen=True)
class SealedPack:
    """A pack ready for upload: its frames in the file `path`, its index and chunk table, checked by reading them back."""

    id: str
    path: Path
    index: PackIndex
    index_data: bytes
    table_data: bytes
    chunks: tuple[ChunkEntry, ...]


def spool_failure(error: OSError, spool: Path) -> FloeError:
    """What a failed write to the spool directory means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(
            f"no space left in {spool}, where packs are collected before upload",
            hint="free some space there, or choose another disk with --spool-dir; up to 12 GiB are used at a time",
        )
    return UnavailableError(f"cannot write to {spool}: {error.strerror}")


class _Section:
    """Content appended block-aligned, cut into frames, encoded in the pool, written to a spool file in order.

    A task of the pool encodes the frames of `_TASK` bytes: for one frame of 128 KiB each, its threads would spend more time waiting for Python's lock.
    """

    def __init__(self, path: Path, frame_size: int, pool: Executor) -> None:
        self.path = path
        self.size = 0  # bytes of content, padding included
        self.chunks: list[Chunk] = []
        self.frames: list[FrameEntry] = []
        self._frame_size = frame_size
        self._pool = pool
        self._file: IO[bytes] | None = None
        self._task = bytearray(_TASK)  # zeros, so that padding is there already
        self._filled = 0
        self._waiting: deque[tuple[int, Future[list[tuple[Buffer, FrameEntry]]]]] = deque()
        self._waiting_bytes = 0

    def add(self, chunk: Chunk, data: bytes) -> None:
        chunk.block = self.size // BLOCK
        self.chunks.append(chunk)
        self.size += blocks(len(data)) * BLOCK
        rest = memoryview(data)
        while len(rest) >= _TASK - self._filled:
            size = _TASK - self._filled
            if self._filled:
                self._task[self._filled :] = rest[:size]
                self._filled = _TASK
                self._next_task()
            else:  # nothing to put together
                self._submit(rest[:size])
            rest = rest[size:]
        end = self._filled + len(rest)
        self._task[self._filled : end] = rest
        self._filled = end + -end % BLOCK
        if self._filled == _TASK:
            self._next_task()

    def _next_task(self) -> None:
        content, self._task = memoryview(self._task)[: self._filled], bytearray(_TASK)
        self._filled = 0
        self._submit(content)

    def _submit(self, content: memoryview) -> None:
        size = self._frame_size
        frames = [content[start : start + size] for start in range(0, len(content), size)]
        self._waiting.append((len(content), self._pool.submit(encode_frames, frames)))
        self._waiting_bytes += len(content)
        while self._waiting_bytes > _PENDING:
            self._write_oldest()

    def _write_oldest(self) -> None:
        length, future = self._waiting.popleft()
        encoded = future.result()
        self._waiting_bytes -= length
        if self._file is None:
            self._file = self.path.open("xb")
        for stored, entry in encoded:
            self._file.write(stored)
            self.frames.append(entry)

    def finish(self) -> None:
        """All content is in the file afterwards; an empty section has none."""
        if self._filled:
            self._next_task()
        while self._waiting:
            self._write_oldest()
        self.discard()

    def discard(self) -> None:
        """Close the file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None


class SpoolDirectory(Protocol):
    """Where packs are spooled: a directory of one's own, and a limit to what may lie there (spool.Spool)."""

    path: Path

    @property
    def share(self) -> int:
        """Bytes of an open pack from which on it is sealed early when there is no room."""
        ...

    def take(self, nbytes: int, *, wait: bool) -> bool:
        """Reserve room; False: there is none."""
        ...

    def give_back(self, nbytes: int) -> None:
        """So much of it is free again."""
        ...


class PackWriter:
    """Places chunks into packs of at most `max_content` bytes; `sealed` gets each pack as soon as it is full.

    Room for content is taken from `spool`; whoever gets a sealed pack gives `index.content_size` bytes of it back.
    NoSpaceError or UnavailableError when it cannot be written.
    """

    def __init__(
        self,
        spool: SpoolDirectory,
        frame_size: int,
        pool: Executor,
        sealed: Callable[[SealedPack], None],
        *,
        max_content: int = MAX_CONTENT,
    ) -> None:
        self._spool = spool
        self._frame_size = frame_size
        self._pool = pool
        self._sealed = sealed
        self._max_content = max_content
        self._number = 0
        self._open_sections()

    def _open_sections(self) -> None:
        path = self._spool.path
        self._full = _Section(path / f"{self._number}.full", self._frame_size, self._pool)
        self._small = _Section(path / f"{self._number}.small", self._frame_size, self._pool)
        self._number += 1

    @property
    def open_content(self) -> int:
        """Bytes of content in the pack that is not sealed yet."""
        return self._full.size + self._small.size

    def add(self, chunk: Chunk, data: bytes) -> None:
        """Take `data` as the content of `chunk`, whose place is known once its pack is sealed."""
        size = blocks(len(data)) * BLOCK
        if self.open_content + size > self._max_content:
            self.seal()
        if not self._spool.take(size, wait=False):
            if self.open_content >= self._spool.share:
                self.seal()
            self._spool.take(size, wait=True)
        try:
            (self._full if len(data) == CHUNK else self._small).add(chunk, data)
        except OSError as error:
            raise spool_failure(error, self._spool.path) from error

    def seal(self) -> None:
        """Finish the open pack, if it holds anything, and fill in the places of its chunks."""
        full, small = self._full, self._small
        if not full.size and not small.size:
            return
        try:
            full.finish()
            small.finish()
            path = _join(full, small)
            stored = path.stat().st_size
        except OSError as error:
            raise spool_failure(error, self._spool.path) from error
        base = full.size // BLOCK
        for chunk in small.chunks:
            chunk.block += base
        chunks = [*full.chunks, *small.chunks]
        entries = tuple(ChunkEntry(chunk.digest, chunk.length, chunk.block) for chunk in chunks)
        table = encode_chunk_table(entries)
        index = PackIndex(self._frame_size, full.size + small.size, (*full.frames, *small.frames), digest(table))
        data = index.encode()
        pack_id = index.pack_id
        # What a reader will see must be what was meant, before anything is published.
        decoded = PackIndex.decode(data, pack_id)
        if (
            decoded != index
            or index.stored_size != stored
            or tuple(decode_chunk_table(table, decoded, pack_id)) != entries
        ):
            raise UnavailableError(f"pack {pack_id} was not written as planned", hint="try again; check this machine")
        for chunk in chunks:
            chunk.pack_id = pack_id
        self._open_sections()
        self._sealed(SealedPack(pack_id, path, index, data, table, entries))

    def discard(self) -> None:
        """Drop what is not sealed."""
        self._full.discard()
        self._small.discard()


def _join(full: _Section, small: _Section) -> Path:
    """One file of both, taking no more space on the way: the end of `small` moves first, to where it belongs."""
    if not full.size:
        return small.path
    if small.size:
        with full.path.open("r+b", buffering=0) as out, small.path.open("r+b", buffering=0) as more:
            start, left = full.path.stat().st_size, small.path.stat().st_size
            while left:
                size = min(left, _JOIN)
                left -= size
                _copy(more.fileno(), left, out.fileno(), start + left, size)
                more.truncate(left)
        small.path.unlink()
    return full.path


def _copy(source: int, at: int, target: int, to: int, size: int) -> None:
    """Copy `size` bytes that are there."""
    while size:
        done = copy_range(source, at, target, to, size)
        if not done:
            raise OSError(errno.EIO, "a file of the spool became shorter")
        at, to, size = at + done, to + done, size - done
