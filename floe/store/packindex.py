"""Pack index and chunk table: bytes to values and back. Pure; the byte tables are in docs/FORMAT.md.

A pack object is the concatenation of its frames as stored. Frame i holds content bytes
[i * frame_size, (i + 1) * frame_size), the last one possibly less; content is a multiple of 4096 bytes.
The blake3 of the whole index object is the pack id, so whoever trusts the id can verify every byte.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import DIGEST_BYTES, Buffer, hexdigest

BLOCK = 4096  # bytes; EROFS maps whole blocks, so all content is aligned to this
VERSION = 1
MAX_CONTENT = 4 << 30  # bytes; EROFS block numbers and the uint32 fields leave ample room
MAX_FRAMES = 1 << 16  # of a pack; 4 GiB of the smallest frames that Floe makes are half as many
MAX_CHUNK = 4 << 20  # bytes; larger files are cut
MAX_FRAME = 1 << 20  # bytes of content in a frame; one FUSE READ covers at most this much
MODEL_FRAME = 1 << 20  # weights are read in long runs
LAYER_FRAME = 128 << 10  # a start touches little of each file: 1 MiB fetched 5.8 times the bytes touched
CODEC_RAW, CODEC_ZSTD = 0, 1

_INDEX_MAGIC = b"FLOEPIDX"
# magic, version, flags, frame size, frame count, zero, content bytes, stored bytes,
# digest of the chunk table, encryption key id (zero: not encrypted)
_INDEX_HEADER = struct.Struct("<8sHHIIIQQ32s32s24x")
# stored bytes, codec, zero, digest of the content
_FRAME_ENTRY = struct.Struct("<IB3x32s")

_CHUNKS_MAGIC = b"FLOECHNK"
# magic, version, flags, chunk count
_CHUNKS_HEADER = struct.Struct("<8sHHI16x")
# digest of the chunk, its bytes, its first 4 KiB block in the pack's content
_CHUNK_ENTRY = struct.Struct("<32sII")

INDEX_HEADER_BYTES, FRAME_ENTRY_BYTES = _INDEX_HEADER.size, _FRAME_ENTRY.size
CHUNKS_HEADER_BYTES, CHUNK_ENTRY_BYTES = _CHUNKS_HEADER.size, _CHUNK_ENTRY.size


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """One frame: `stored` bytes in the pack object, `codec` (CODEC_*), blake3 `digest` of its content."""

    stored: int
    codec: int
    digest: bytes


@dataclass(frozen=True)
class PackIndex:
    """The frames of one pack. Sizes and offsets are in bytes."""

    frame_size: int
    content_size: int
    frames: tuple[FrameEntry, ...]
    chunk_table_digest: bytes = bytes(DIGEST_BYTES)

    @cached_property
    def stored_offsets(self) -> tuple[int, ...]:
        """Offset of each frame in the pack object, and the object's size as the last item."""
        return (0, *itertools.accumulate(f.stored for f in self.frames))

    @property
    def stored_size(self) -> int:
        """Size of the pack object."""
        return self.stored_offsets[-1]

    @property
    def fits(self) -> bool:
        """Whether each frame takes as many stored bytes as its content has, or fewer if it is compressed."""
        last = self.content_length(len(self.frames) - 1)
        lengths = itertools.chain(itertools.repeat(self.frame_size, len(self.frames) - 1), (last,))
        return all(
            0 < f.stored <= length and (f.stored == length or f.codec != CODEC_RAW)
            for f, length in zip(self.frames, lengths, strict=True)
        )

    def content_length(self, frame: int) -> int:
        """Content bytes of frame number `frame`."""
        return min(self.frame_size, self.content_size - frame * self.frame_size)

    def frame_range(self, offset: int, length: int) -> range:
        """Numbers of the frames that hold content bytes [offset, offset + length); length > 0."""
        return range(offset // self.frame_size, (offset + length - 1) // self.frame_size + 1)

    def encode(self) -> bytes:
        """The index object's bytes."""
        header = _INDEX_HEADER.pack(
            _INDEX_MAGIC, VERSION, 0, self.frame_size, len(self.frames), 0,
            self.content_size, self.stored_size, self.chunk_table_digest, bytes(32),
        )  # fmt: skip
        return header + b"".join(_FRAME_ENTRY.pack(f.stored, f.codec, f.digest) for f in self.frames)

    @property
    def pack_id(self) -> str:
        """blake3 of `encode()`, in hex."""
        return hexdigest(self.encode())

    @classmethod
    def decode(cls, data: Buffer, pack_id: str) -> PackIndex:
        """Parse and check an index object against the id it was fetched by.

        Raises DamagedError (digest or sizes do not fit) or UnsupportedError (version, encryption, codec).
        """
        what = f"pack index {pack_id}"
        if hexdigest(data) != pack_id:
            raise DamagedError(f"{what} does not match its digest", hint="push its model or index its image again")
        if len(data) < _INDEX_HEADER.size:
            raise DamagedError(f"{what} is truncated: {len(data)} bytes")
        magic, version, flags, frame_size, count, _, content, stored, chunks, key_id = _INDEX_HEADER.unpack_from(data)
        if magic != _INDEX_MAGIC:
            raise DamagedError(f"{what} has no pack index header")
        if version != VERSION or flags or any(key_id):
            raise UnsupportedError(
                f"{what} has format version {version}, flags {flags:#x}; this Floe reads version {VERSION}",
                hint="upgrade Floe on this node",
            )
        if not _sane(frame_size, count, content) or len(data) != _INDEX_HEADER.size + count * _FRAME_ENTRY.size:
            raise DamagedError(f"{what} has sizes that do not fit together")
        frames = tuple(FrameEntry(*entry) for entry in _FRAME_ENTRY.iter_unpack(data[_INDEX_HEADER.size :]))
        if any(f.codec not in (CODEC_RAW, CODEC_ZSTD) for f in frames):
            raise UnsupportedError(f"{what} uses an unknown codec", hint="upgrade Floe on this node")
        index = cls(frame_size, content, frames, chunks)
        if index.stored_size != stored or not index.fits:
            raise DamagedError(f"{what} has sizes that do not fit together")
        return index


def index_bytes(header: Buffer, pack_id: str) -> int:
    """Bytes of the index object that begins with `header` (INDEX_HEADER_BYTES), which nothing vouches for yet.

    DamagedError for what begins no index.
    """
    magic, _, _, _, count, *_ = _INDEX_HEADER.unpack(header)
    frames: int = count
    if magic != _INDEX_MAGIC or frames > MAX_FRAMES:
        raise DamagedError(
            f"pack index {pack_id} has no pack index header", hint="push its model or index its image again"
        )
    return _INDEX_HEADER.size + frames * _FRAME_ENTRY.size


def _sane(frame_size: int, count: int, content: int) -> bool:
    power_of_two = frame_size >= BLOCK and frame_size & (frame_size - 1) == 0
    return (
        power_of_two
        and frame_size <= MAX_FRAME
        and 0 < content <= MAX_CONTENT
        and content % BLOCK == 0
        and count == -(-content // frame_size)
        and count <= MAX_FRAMES
    )


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """A chunk stored in a pack: its blake3 `digest`, its `length` in bytes, its first 4 KiB `block`."""

    digest: bytes
    length: int
    block: int


def encode_chunk_table(chunks: Iterable[ChunkEntry]) -> bytes:
    """The chunk table object's bytes; its blake3 goes into the pack index."""
    entries = [_CHUNK_ENTRY.pack(c.digest, c.length, c.block) for c in chunks]
    return _CHUNKS_HEADER.pack(_CHUNKS_MAGIC, VERSION, 0, len(entries)) + b"".join(entries)


def decode_chunk_table(data: Buffer, index: PackIndex, pack_id: str) -> list[ChunkEntry]:
    """Parse a chunk table, checked against the digest in its pack's index and the pack's size; DamagedError otherwise."""
    what = f"chunk table of pack {pack_id}"
    if bytes.fromhex(hexdigest(data)) != index.chunk_table_digest or len(data) < _CHUNKS_HEADER.size:
        raise DamagedError(f"{what} does not match its digest", hint="push its model or index its image again")
    magic, version, flags, count = _CHUNKS_HEADER.unpack_from(data)
    if magic != _CHUNKS_MAGIC or len(data) != _CHUNKS_HEADER.size + count * _CHUNK_ENTRY.size:
        raise DamagedError(f"{what} cannot be parsed")
    if version != VERSION or flags:
        raise UnsupportedError(f"{what} has format version {version}", hint="upgrade Floe on this node")
    if count > index.content_size // BLOCK:
        raise DamagedError(f"{what} has {count} chunks, more than the pack has blocks")
    table = [ChunkEntry(*entry) for entry in _CHUNK_ENTRY.iter_unpack(data[_CHUNKS_HEADER.size :])]
    if any(not 0 < c.length <= MAX_CHUNK or c.block * BLOCK + c.length > index.content_size for c in table):
        raise DamagedError(f"{what} has a chunk that does not lie in the pack")
    return table
