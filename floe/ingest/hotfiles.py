"""Which files of a layer are wanted side by side, by a start-up profile; and the sink that tells an ingest."""

from __future__ import annotations

from collections.abc import Iterable

from floe.ingest.chunker import Readable
from floe.ingest.publish import Ingest
from floe.store.nodes import CHUNK, FileContent
from floe.store.profile import PIECE, Piece

_SHARE = 2  # a file belongs to the hot ones when a start reads at least one in so many of its pieces


class HotFiles:
    """Out of `pieces`, the pieces of files that starts read, in the order of need."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._ranks: dict[bytes, int] = {}
        self._read: dict[bytes, int] = {}  # pieces
        for path, _ in pieces:
            self._ranks.setdefault(path, len(self._ranks))
            self._read[path] = self._read.get(path, 0) + 1

    def __len__(self) -> int:
        return len(self._ranks)

    def rank(self, path: bytes, size: int) -> int | None:
        """The place among the hot files of one of `size` bytes; None when it is none, or too large to be moved.

        A file of a chunk and more keeps chunks of 4 MiB, whose frames lie side by side as they are.
        """
        rank = self._ranks.get(path)
        if rank is None or not 0 < size < CHUNK or self._read[path] * _SHARE < -(-size // PIECE):
            return None
        return rank


class HotSink:
    """Hands the contents of hot `files` of a layer to `ingest`."""

    def __init__(self, ingest: Ingest, files: HotFiles) -> None:
        self._ingest = ingest
        self._files = files

    def add_hot(self, path: bytes, readable: Readable, size: int) -> FileContent | None:
        """Store a hot file's content; None, and nothing is read, when it is not one of them."""
        rank = self._files.rank(path, size)
        return None if rank is None else self._ingest.add_stream(readable, size, rank=rank)
