"""Layers written gzipped: the same bytes each time, their digests known at the end."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LEVEL = 6
_PIECE = 1 << 20


class GzipWriter(io.RawIOBase):
    """A file that is written gzipped, without a name or time in it; its digests and size are known at the end."""

    def __init__(self, file: io.BufferedWriter) -> None:
        super().__init__()
        self._file = file
        self._deflate = _deflate()
        self._plain, self._packed, self.size = hashlib.sha256(), hashlib.sha256(), 0

    def write(self, data: Any, /) -> int:
        """Add bytes of the tar."""
        self._plain.update(data)
        self._emit(self._deflate.compress(data))
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Write what is left; only now the digests and the size are right."""
        self._emit(self._deflate.flush())

    def _emit(self, data: bytes) -> None:
        self._packed.update(data)
        self.size += self._file.write(data)

    @property
    def digest(self) -> str:
        """Of the gzipped bytes."""
        return f"sha256:{self._packed.hexdigest()}"

    @property
    def diff_id(self) -> str:
        """Of the tar inside."""
        return f"sha256:{self._plain.hexdigest()}"


def gzipped(data: bytes) -> bytes:
    """`data` as GzipWriter writes it: the gzip module's header differs between versions of Python."""
    deflate = _deflate()
    return deflate.compress(data) + deflate.flush()


def file_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _deflate() -> zlib._Compress:
    return zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
