"""Layer blobs to tar streams: gzip, zstd or plain, told apart by their first bytes, in bounded memory.

The media type is not asked: Docker's layers are known to carry the wrong one, and containerd looks at the bytes too.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import zstandard

from floe.store.errors import DamagedError, UnsupportedError

_inflater: Any = zlib.decompressobj
_INVALID: tuple[Any, ...] = (zlib.error,)
try:
    from isal import isal_zlib  # takes some half of zlib's time
except ImportError:  # it is not built for this processor
    pass
else:
    _inflater, _INVALID = isal_zlib.decompressobj, (isal_zlib.error, zlib.error)

_OUTPUT = 1 << 20  # bytes of one decompressed piece at most (gzip)
# A zstd block of 4 bytes can stand for 128 KiB, and the library's streaming object has no output limit: 2 KiB of
# input become 64 MiB at worst.
_ZSTD_INPUT = 2 << 10
_WINDOW_MAX = 1 << 27  # bytes; zstd's own limit unless told otherwise
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # after one byte 0x50 to 0x5f
_HEAD = 4


def decompress(chunks: Iterable[bytes], what: str) -> Iterator[bytes]:
    """The tar stream in a blob given in pieces. DamagedError: cut short or malformed; `what` names the blob."""
    return unpack(chunks, what)[1]


def unpack(chunks: Iterable[bytes], what: str) -> tuple[bool, Iterator[bytes]]:
    """Whether the blob is the tar stream itself, uncompressed, and that stream; see `decompress`."""
    pieces = iter(chunks)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= _HEAD:
            break
    whole = _again(head, pieces)
    if head.startswith(_GZIP):
        return False, _gunzip(whole, what)
    if head.startswith(_ZSTD) or (head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50):
        return False, _unzstd(whole, what)
    return True, whole


def hashed(chunks: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """`chunks`, each added to `digest` as it passes."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _again(head: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(chunks: Iterable[bytes], what: str) -> Iterator[bytes]:
    member = _inflater(wbits=31)
    fresh = False  # whether `member` has seen no byte, behind another member
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                if fresh:
                    rest = rest.lstrip(b"\0")  # padding behind the last member
                    if not rest:
                        break
                    fresh = False
                piece = member.decompress(rest, _OUTPUT)
                if piece:
                    yield piece
                if member.eof:
                    rest = member.unused_data
                    member, fresh = _inflater(wbits=31), True
                else:
                    rest = member.unconsumed_tail
            while not fresh and (piece := member.decompress(b"", _OUTPUT)):
                yield piece
    except _INVALID as error:
        raise DamagedError(f"{what} is not valid gzip: {error}") from error
    if not fresh:
        raise DamagedError(f"{what} is truncated gzip", hint="build or push the image again")


def _unzstd(chunks: Iterable[bytes], what: str) -> Iterator[bytes]:
    maker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
    frame = maker.decompressobj()
    fresh = False
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), _ZSTD_INPUT):
                rest = chunk[start : start + _ZSTD_INPUT]
                while rest:
                    fresh = False
                    piece = frame.decompress(rest)
                    if piece:
                        yield piece
                    rest = b""
                    if frame.eof:
                        rest = frame.unused_data
                        frame, fresh = maker.decompressobj(), True
    except zstandard.ZstdError as error:
        if "memory" in str(error) or "window" in str(error).lower():
            raise UnsupportedError(f"{what} needs a zstd window of more than {_WINDOW_MAX >> 20} MiB") from error
        raise DamagedError(f"{what} is not valid zstd: {error}") from error
    if not fresh:
        raise DamagedError(f"{what} is truncated zstd", hint="build or push the image again")
