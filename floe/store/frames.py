"""Frames: content to stored bytes and back, and the proof that bytes were checked. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

import zstandard

from floe.store.errors import TransitDamageError
from floe.store.ids import DIGEST_BYTES, Buffer, digest
from floe.store.packindex import CODEC_RAW, CODEC_ZSTD, FrameEntry, PackIndex

_LEVEL: Final = 3  # zstd's default: higher ones cost pushes more time than readers gain
# A large frame is tried out first, since zstd takes a second for each GiB of weights that do not shrink: so many pieces
# of it, at equal distances, must become smaller by some hundredths.
_TRIED: Final = 512 << 10  # bytes of a frame from which on it is tried
_SAMPLES, _SAMPLE = 8, 8 << 10  # pieces, bytes of each


class VerifiedFrame:
    """Content that matched its digest: there is no other way to make one."""

    __slots__ = ("content", "digest")

    def __init__(self, content: Buffer, expected: bytes) -> None:
        """Hash `content`; TransitDamageError when it is not what `expected` (blake3, 32 bytes) names."""
        if digest(content) != expected:
            raise TransitDamageError(f"a frame of {len(content)} bytes does not match its digest {expected.hex()}")
        self.content: Final = content
        self.digest: Final = expected

    def __len__(self) -> int:
        return len(self.content)


def encode_frame(content: Buffer) -> tuple[Buffer, FrameEntry]:
    """A frame as stored and its index entry: zstd when that saves at least a tenth, else raw.

    A frame of 512 KiB or more of which samples save nearly nothing is not tried whole.
    """
    return encode_frames([content])[0]


def encode_frames(contents: Sequence[Buffer]) -> list[tuple[Buffer, FrameEntry]]:
    """The same for several frames, some MiB in all: compressed in one call, without Python's lock."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    large = [number for number, content in enumerate(contents) if len(content) >= _TRIED]
    raw = set[int]()
    if large:
        samples: list[Buffer] = [_sample(contents[number]) for number in large]
        tried = compressor.multi_compress_to_buffer(samples, threads=1)
        raw = {number for at, number in enumerate(large) if len(tried[at]) * 100 > len(samples[at]) * 97}
    found = [number for number in range(len(contents)) if number not in raw]
    encoded = {number: _raw(contents[number]) for number in raw}
    if found:
        packed = compressor.multi_compress_to_buffer([contents[number] for number in found], threads=1)
        encoded |= {number: _smaller(contents[number], packed[at]) for at, number in enumerate(found)}
    return [encoded[number] for number in range(len(contents))]


def _sample(content: Buffer) -> bytes:
    view = memoryview(content)
    step = len(view) // _SAMPLES
    return b"".join(view[start : start + _SAMPLE] for start in range(0, step * _SAMPLES, step))


def _raw(content: Buffer) -> tuple[Buffer, FrameEntry]:
    return content, FrameEntry(len(content), CODEC_RAW, digest(content))


def _smaller(content: Buffer, packed: Any) -> tuple[Buffer, FrameEntry]:
    """`packed` is a zstandard.BufferSegment, a buffer of which its stubs do not say so."""
    if len(packed) * 10 <= len(content) * 9:
        return memoryview(packed), FrameEntry(len(packed), CODEC_ZSTD, digest(content))
    return _raw(content)


def decode_frame(stored: Buffer, entry: FrameEntry, length: int, into: memoryview | None = None) -> VerifiedFrame:
    """The `length` content bytes of a frame as stored. TransitDamageError for anything else than what was stored.

    `into` (`length` bytes, which then belong to the frame) gets the content; without it the frame may be a view of `stored`.
    """
    content = _content(stored, entry, length)
    if into is None:
        return VerifiedFrame(content, entry.digest)
    if len(content) != length:
        raise TransitDamageError(f"a frame holds {len(content)} bytes instead of {length}")
    into[:] = content
    return VerifiedFrame(into.toreadonly(), entry.digest)


def _content(stored: Buffer, entry: FrameEntry, length: int) -> Buffer:
    if entry.codec == CODEC_RAW:
        return stored
    try:
        # The size in the zstd header decides what is allocated: it must not come unchecked from the network.
        if zstandard.frame_content_size(stored) != length:
            raise TransitDamageError(f"a compressed frame does not hold {length} bytes")
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TransitDamageError(f"a frame cannot be decompressed: {error}") from error


class FrameTable:
    """A pack index in 48 bytes a frame; the parsed PackIndex of a large pack of small frames takes 10 MiB."""

    __slots__ = ("_chunks", "_codecs", "_digests", "_offsets", "content_size", "count", "frame_size")

    def __init__(self, index: PackIndex) -> None:
        self.frame_size = index.frame_size
        self.content_size = index.content_size
        self.count = len(index.frames)
        self._chunks = index.chunk_table_digest
        self._offsets = array("Q", index.stored_offsets)
        self._codecs = bytes(f.codec for f in index.frames)
        self._digests = b"".join(f.digest for f in index.frames)

    def __len__(self) -> int:
        return self.count

    def encode(self) -> bytes:
        """The index object that this was made from."""
        frames = tuple(map(self.entry, range(self.count)))
        return PackIndex(self.frame_size, self.content_size, frames, self._chunks).encode()

    def entry(self, frame: int) -> FrameEntry:
        """The index entry of frame number `frame`."""
        start = frame * DIGEST_BYTES
        stored = self._offsets[frame + 1] - self._offsets[frame]
        return FrameEntry(stored, self._codecs[frame], self._digests[start : start + DIGEST_BYTES])

    def stored_range(self, first: int, count: int = 1) -> tuple[int, int]:
        """(offset, length) in bytes of `count` frames from `first` on in the pack object."""
        start = self._offsets[first]
        return start, self._offsets[first + count] - start

    def content_length(self, frame: int) -> int:
        """Content bytes of frame number `frame`."""
        return min(self.frame_size, self.content_size - frame * self.frame_size)

    def memory(self, frame: int) -> int:
        """Bytes of memory that fetching this frame takes: its content, and beside it its stored form if compressed."""
        stored = self._offsets[frame + 1] - self._offsets[frame]
        content = self.content_length(frame)
        return content if self._codecs[frame] == CODEC_RAW else content + stored
