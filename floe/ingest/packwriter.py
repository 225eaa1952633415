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
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeAlias

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

_TASK = 4 * MAX_FRAME  # bytes of content that are encoded at a time, of every frame size a multiple; or a chunk more
_PENDING = 4 * _TASK  # bytes of content of a section that wait to be encoded or written
_ROOM_STEP = 1 << 20  # bytes of room in the spool that are taken ahead
_PADDING = bytes(BLOCK)
_JOIN = 16 << 20  # bytes moved at a time when sections are joined


_Encoded: TypeAlias = "list[tuple[Buffer, FrameEntry]]"


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

    A task of the pool puts together the content of some `_TASK` bytes, encodes it, and writes what has become next in line:
    the thread that adds content neither copies nor writes it.
    """

    def __init__(self, path: Path, frame_size: int, pool: Executor) -> None:
        self.path = path
        self.size = 0  # bytes of content, padding included
        self.chunks: list[Chunk] = []
        self.frames: list[FrameEntry] = []
        self._frame_size = frame_size
        self._pool = pool
        self._file: IO[bytes] | None = None
        self._task: list[bytes] = []
        self._filled = 0
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._waiting_bytes = 0
        self._tasks = self._written = 0  # the numbers of the next task, and of the next one to be written
        self._encoded: dict[int, _Encoded] = {}
        self._writing = threading.Lock()  # guards the two above, the file and `frames`

    def add(self, chunk: Chunk, data: bytes) -> None:
        chunk.block = self.size // BLOCK
        self.chunks.append(chunk)
        padding = -len(data) % BLOCK
        self._task.append(data)
        if padding:
            self._task.append(_PADDING[:padding])
        self.size += len(data) + padding
        self._filled += len(data) + padding
        if self._filled >= _TASK:
            # What is behind the last whole frame, the end of this chunk, begins the next task.
            over = self._filled % self._frame_size
            self._next_task(self._filled - over)
            if over > padding:
                self._task.append(data[padding - over :])
            if over:
                self._task.append(_PADDING[: min(over, padding)])
            self._filled = over

    def _next_task(self, size: int) -> None:
        """Let the first `size` bytes of what has come be encoded."""
        task, self._task, self._filled = self._task, [], 0
        if self._file is None:
            self._file = self.path.open("xb", buffering=0)
        self._waiting.append((size, self._pool.submit(self._encode, self._tasks, task, size)))
        self._tasks += 1
        self._waiting_bytes += size
        while self._waiting and (self._waiting_bytes > _PENDING or self._waiting[0][1].done()):
            self._await_oldest()

    def _await_oldest(self) -> None:
        size, future = self._waiting.popleft()
        future.result()
        self._waiting_bytes -= size

    def _encode(self, number: int, task: list[bytes], length: int) -> None:
        content = memoryview(task[0] if len(task) == 1 else b"".join(task))[:length]  # joined without Python's lock
        task.clear()
        size = self._frame_size
        encoded = encode_frames([content[start : start + size] for start in range(0, len(content), size)])
        with self._writing:
            self._encoded[number] = encoded
            while (ready := self._encoded.pop(self._written, None)) is not None:
                assert self._file is not None
                _write(self._file.fileno(), [stored for stored, _ in ready])
                self.frames += [entry for _, entry in ready]
                self._written += 1

    def finish(self) -> None:
        """All content is in the file afterwards; an empty section has none."""
        if self._filled:
            self._next_task(self._filled)
        while self._waiting:
            self._await_oldest()
        self.discard()

    def discard(self) -> None:
        """Close the file without finishing it."""
        with self._writing:
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
        self._granted = 0  # bytes of room taken and not used yet
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
        if size > self._granted:
            self._reserve(size)
        self._granted -= size
        try:
            (self._full if len(data) == CHUNK else self._small).add(chunk, data)
        except OSError as error:
            raise spool_failure(error, self._spool.path) from error

    def _reserve(self, size: int) -> None:
        """Take room for `size` bytes, and, where there is plenty, for what comes next: asking for each file took time."""
        more = min(_ROOM_STEP, self._spool.share // 8)
        if self._spool.take(size + more, wait=False):
            self._granted += size + more
            return
        self._give_back_rest()
        if not self._spool.take(size, wait=False):
            if self.open_content >= self._spool.share:
                self.seal()
            self._spool.take(size, wait=True)
        self._granted = size

    def _give_back_rest(self) -> None:
        self._spool.give_back(self._granted)
        self._granted = 0

    def seal(self) -> None:
        """Finish the open pack, if it holds anything, and fill in the places of its chunks."""
        full, small = self._full, self._small
        self._give_back_rest()
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


def _write(file: int, data: list[Buffer]) -> None:
    """All of `data`, in one call where the kernel takes it."""
    left = sum(map(len, data)) - os.writev(file, data)
    if left:
        rest = memoryview(b"".join(data))[-left:]
        while rest:
            rest = rest[os.write(file, rest) :]


def _copy(source: int, at: int, target: int, to: int, size: int) -> None:
    """Copy `size` bytes that are there."""
    while size:
        done = copy_range(source, at, target, to, size)
        if not done:
            raise OSError(errno.EIO, "a file of the spool became shorter")
        at, to, size = at + done, to + done, size - done
