"""The tree object: an EROFS image in an envelope. Pure; the byte table is in docs/FORMAT.md.

The object is named by the blake3 of the EROFS image inside, so that the name does not change with compression.
"""

from __future__ import annotations

import struct

import zstandard

from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import Buffer, hexdigest

VERSION = 1
MAX_IMAGE = 1 << 30  # bytes; refuses an absurd size before memory is asked for
# An image larger than _FREE must not be more than _RATIO times what it is stored in: who can write the store could have
# readers allocate what they do not have. The writer stores such a one as it is.
_FREE, _RATIO = 64 << 20, 256
CODEC_RAW, CODEC_ZSTD = 0, 1
_MAGIC = b"FLOETREE"
# magic, version, flags, codec, zero, image bytes, encryption key id (zero: not encrypted)
_HEADER = struct.Struct("<8sHHB3xQ32s8x")
HEADER_BYTES = _HEADER.size


def encode_tree(image: Buffer) -> bytes:
    """The tree object of an EROFS image: zstd when that saves at least a tenth, and not absurdly much, else raw."""
    packed = zstandard.ZstdCompressor(level=3).compress(image)
    smaller = len(packed) * 10 <= len(image) * 9 and len(image) <= _most(len(packed))
    codec, body = (CODEC_ZSTD, packed) if smaller else (CODEC_RAW, bytes(image))
    return _HEADER.pack(_MAGIC, VERSION, 0, codec, len(image), bytes(32)) + body


def decode_tree(data: Buffer, tree_digest: str) -> bytes:
    """The EROFS image, verified. Raises DamagedError or UnsupportedError."""
    what = f"tree {tree_digest}"
    hint = "push its model or index its image again"
    if len(data) < _HEADER.size:
        raise DamagedError(f"{what} is truncated: {len(data)} bytes", hint=hint)
    magic, version, flags, codec, size, key_id = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedError(f"{what} has no tree header", hint=hint)
    if version != VERSION or flags or any(key_id) or codec not in (CODEC_RAW, CODEC_ZSTD):
        raise UnsupportedError(
            f"{what} has format version {version}, flags {flags:#x}, codec {codec}; this Floe reads version {VERSION}",
            hint="upgrade Floe on this node",
        )
    body = memoryview(data)[_HEADER.size :]
    if size > MAX_IMAGE or size > _most(len(body)):
        raise DamagedError(f"{what} claims to hold {size} bytes in {len(body)}", hint=hint)
    if codec == CODEC_ZSTD:
        try:
            # The frame's own size is what the library allocates, whatever max_output_size says: check it first.
            if zstandard.frame_content_size(body) not in (size, -1):
                raise DamagedError(f"{what} does not match its size", hint=hint)
            unpacked = zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
            body = memoryview(unpacked)
        except zstandard.ZstdError as error:
            raise DamagedError(f"{what} cannot be decompressed: {error}", hint=hint) from error
    if len(body) != size or hexdigest(body) != tree_digest:
        raise DamagedError(f"{what} does not match its digest", hint=hint)
    return bytes(body)


def _most(stored: int) -> int:
    """Bytes of the largest image that is read out of so many stored ones."""
    return max(_FREE, _RATIO * stored)
