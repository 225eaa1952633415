"""The content of a layer's hot files, kept until all of it is known, then written in the order in which starts want it.

Content that is in the store already stays where it is when its neighbours are hot as well: then it was laid out for an
earlier version. Where it lies scattered it is stored once more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from floe.ingest.packwriter import PackWriter, spool_failure
from floe.store.errors import UnavailableError
from floe.store.ids import digest
from floe.store.nodes import Chunk, blocks
from floe.store.packindex import BLOCK

HOT_MAX = 256 << 20  # bytes of a layer; it lies in the spool directory beside what is uploaded
LEAST = 8  # files; fewer are not worth a pack of their own
_TOGETHER = 1 << 20  # bytes that lie side by side and are enough to be left there
_GAP = 8  # blocks between neighbours
_DENSITY = 2  # at least one in so many of their bytes is hot


@dataclass(frozen=True)
class LaidOut:
    """Bytes of content laid out together; those of them that the store had already, elsewhere; and those left where they were."""

    written: int = 0
    copied: int = 0
    kept: int = 0


@dataclass(slots=True)
class _Piece:
    """`chunk` has a place when the store has its content already."""

    rank: int
    chunk: Chunk
    offset: int  # in the file


class HotContent:
    """Chunks of hot files, each shorter than a full one, on local disk in `folder`. For one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._pieces: list[_Piece] = []
        self._together: list[Chunk] = []
        self._size = 0

    def add(self, rank: int, chunk: Chunk, data: bytes) -> bool:
        """Keep `data`, the content of `chunk`, until `lay_out`; False when there is enough already."""
        if self._size + len(data) > HOT_MAX:
            return False
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - `close` closes it
            self._file.write(data)
        except OSError as error:
            raise spool_failure(error, self._folder) from error
        self._pieces.append(_Piece(rank, chunk, self._size))
        self._size += len(data)
        return True

    @property
    def packs(self) -> tuple[str, ...]:
        """Where what was laid out lies, now or since an earlier version; after the writer has sealed its pack."""
        return tuple(dict.fromkeys(chunk.pack_id for chunk in self._together))

    def lay_out(self, writer: PackWriter) -> LaidOut:
        """Write what has no place yet, or lies scattered, into packs of its own, which nothing else is in before it.

        Too little for that is added to what is open, and none of it moves. Afterwards nothing is kept here.
        """
        pieces, self._pieces = sorted(self._pieces, key=lambda piece: piece.rank), []
        local = {id(piece) for piece in _side_by_side([piece for piece in pieces if piece.chunk.pack_id])}
        wanted = [piece for piece in pieces if id(piece) not in local]
        self._together += [piece.chunk for piece in pieces if id(piece) in local]
        if len(wanted) < LEAST:
            wanted = [piece for piece in pieces if not piece.chunk.pack_id]
        else:
            self._together += [piece.chunk for piece in wanted]
            writer.seal()
        copied = sum(piece.chunk.length for piece in wanted if piece.chunk.pack_id)
        for piece in wanted:
            data = self._read(piece)
            piece.chunk.pack_id, piece.chunk.block = "", 0
            writer.add(piece.chunk, data)
        self.close()
        written = sum(piece.chunk.length for piece in wanted)
        return LaidOut(written, copied, sum(piece.chunk.length for piece in pieces) - written)

    def _read(self, piece: _Piece) -> bytes:
        assert self._file is not None
        try:
            self._file.seek(piece.offset)
            data = self._file.read(piece.chunk.length)
        except OSError as error:
            raise spool_failure(error, self._folder) from error
        if digest(data) != piece.chunk.digest:
            raise UnavailableError(f"{self._folder} does not give back what was written to it", hint="check its disk")
        return data

    def close(self) -> None:
        """Forget all of it."""
        self._size = 0
        if self._file is not None:
            self._file.close()
            self._file = None


def _side_by_side(pieces: list[_Piece]) -> Iterator[_Piece]:
    """Those of stored pieces that lie among enough others."""
    total = sum(blocks(piece.chunk.length) for piece in pieces) * BLOCK
    enough = min(_TOGETHER, total // 2)
    group: list[_Piece] = []
    for piece in [*sorted(pieces, key=lambda piece: (piece.chunk.pack_id, piece.chunk.block)), None]:
        if group and (piece is None or not _near(group[-1], piece)):
            held = sum(blocks(member.chunk.length) for member in group)
            span = group[-1].chunk.block + blocks(group[-1].chunk.length) - group[0].chunk.block
            if held * BLOCK >= enough and held * _DENSITY >= span:
                yield from group
            group = []
        if piece is not None:
            group.append(piece)


def _near(one: _Piece, other: _Piece) -> bool:
    end = one.chunk.block + blocks(one.chunk.length)
    return one.chunk.pack_id == other.chunk.pack_id and other.chunk.block - end <= _GAP
