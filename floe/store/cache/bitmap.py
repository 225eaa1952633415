"""Which frames of a pack are in the cache: bits in memory and their file. Pure.

The file is a header of 64 bytes and two planes of one bit per frame, lowest bit first:

    0   8   magic FLOEBITS
    8   2   version, 1
    10  1   clean: 1 when the pack's data was synced after its last change
    11  1   zero
    12  4   frame size in bytes
    16  8   content size in bytes
    24  36  boot id during the last change, text
    60  4   zero
    64      trusted plane, then suspect plane, each of ceil(frames / 8) bytes

A trusted bit is set only after the frame's data was written, so it holds for as long as the page cache lives: through
the death of the writer, not through the machine's. A file that is not clean and comes from another boot therefore has its
trusted bits turned into suspect ones on loading: such a frame is present, and is hashed again before its first use.
"""

from __future__ import annotations

import struct

from floe.store.packindex import BLOCK, MAX_CONTENT, MAX_FRAME

_MAGIC = b"FLOEBITS"
_VERSION = 1
_HEADER = struct.Struct("<8sHBxIQ36s4x")
HEADER_BYTES = _HEADER.size


class Bitmap:
    """The bits of one pack. Who changes them holds the pack's lock; reading `trusted` needs none.

    `clean` and `boot_id` are what the file on disk may say; it is clean for sure only after a sync.
    """

    __slots__ = ("boot_id", "clean", "content_size", "count", "frame_size", "suspect", "trusted")

    def __init__(self, frame_size: int, content_size: int, boot_id: str) -> None:
        self.frame_size = frame_size
        self.content_size = content_size
        self.boot_id = boot_id
        self.clean = False
        self.count = -(-content_size // frame_size)
        self.trusted = bytearray(-(-self.count // 8))
        self.suspect = bytearray(len(self.trusted))

    def header(self, *, clean: bool | None = None, boot_id: str | None = None) -> bytes:
        """The first 64 bytes of the file; `clean` and `boot_id` replace what is said now."""
        clean = self.clean if clean is None else clean
        text = (self.boot_id if boot_id is None else boot_id).encode()
        return _HEADER.pack(_MAGIC, _VERSION, clean, self.frame_size, self.content_size, text)

    def encode(self, *, clean: bool | None = None, boot_id: str | None = None) -> bytes:
        """The whole file; see `header`."""
        return self.header(clean=clean, boot_id=boot_id) + self.trusted + self.suspect

    @classmethod
    def decode(cls, data: bytes) -> Bitmap | None:
        """The bits of a file; None for anything that is not a whole one."""
        if len(data) < _HEADER.size:
            return None
        magic, version, clean, frame_size, content_size, boot_id = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or clean > 1 or not _sane(frame_size, content_size):
            return None
        bitmap = cls(frame_size, content_size, boot_id.decode("ascii", "replace"))
        plane = len(bitmap.trusted)
        if len(data) != _HEADER.size + 2 * plane:
            return None
        bitmap.clean = bool(clean)
        bitmap.trusted[:] = data[_HEADER.size : _HEADER.size + plane]
        bitmap.suspect[:] = data[_HEADER.size + plane :]
        spare = 0xFF << (bitmap.count % 8 or 8) & 0xFF
        return None if (bitmap.trusted[-1] | bitmap.suspect[-1]) & spare else bitmap

    def distrust(self) -> None:
        """Every frame that is present becomes suspect."""
        for i, byte in enumerate(self.trusted):
            self.suspect[i] |= byte
        self.trusted[:] = bytes(len(self.trusted))

    def fill(self) -> None:
        """Every frame is present and trusted."""
        self.trusted[:] = ((1 << self.count) - 1).to_bytes(len(self.trusted), "little")
        self.suspect[:] = bytes(len(self.suspect))

    def is_trusted(self, frame: int) -> bool:
        """Whether this frame may be read as it is."""
        return bool(self.trusted[frame >> 3] >> (frame & 7) & 1)

    def is_suspect(self, frame: int) -> bool:
        """Whether this frame is present, to be hashed before use."""
        return bool(self.suspect[frame >> 3] >> (frame & 7) & 1)

    def covers(self, first: int, last: int) -> bool:
        """Whether all frames of [first, last] are trusted."""
        mask = (1 << (last - first + 1)) - 1
        return int.from_bytes(self.trusted[first >> 3 : (last >> 3) + 1], "little") >> (first & 7) & mask == mask

    def is_full(self) -> bool:
        """Whether every frame is trusted."""
        return self.covers(0, self.count - 1)

    def trust(self, frame: int) -> None:
        """Mark one frame as present and verified."""
        self.trusted[frame >> 3] |= 1 << (frame & 7)
        self.suspect[frame >> 3] &= ~(1 << (frame & 7))

    def clear(self, frame: int) -> None:
        """Mark one frame as absent."""
        self.trusted[frame >> 3] &= ~(1 << (frame & 7))
        self.suspect[frame >> 3] &= ~(1 << (frame & 7))

    def content_length(self, frame: int) -> int:
        """Content bytes of a frame."""
        return min(self.frame_size, self.content_size - frame * self.frame_size)

    def present(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Numbers of the frames in [start, stop) that are present, trusted or suspect."""
        stop = self.count if stop is None else min(stop, self.count)
        found = []
        for at in range(start >> 3, (stop + 7) >> 3):
            byte = self.trusted[at] | self.suspect[at]
            if byte:
                found += [f for f in range(at * 8, at * 8 + 8) if byte >> (f & 7) & 1 and start <= f < stop]
        return found

    def held(self) -> int:
        """Bytes of content of all frames that are present."""
        present = int.from_bytes(self.trusted, "little") | int.from_bytes(self.suspect, "little")
        last = self.count - 1
        short = self.frame_size - self.content_length(last) if present >> last & 1 else 0
        return present.bit_count() * self.frame_size - short


def _sane(frame_size: int, content_size: int) -> bool:
    power_of_two = frame_size & (frame_size - 1) == 0
    return (
        power_of_two
        and BLOCK <= frame_size <= MAX_FRAME
        and 0 < content_size <= MAX_CONTENT
        and not content_size % BLOCK
    )


def runs(frames: list[int]) -> list[tuple[int, int]]:
    """Ascending frame numbers as runs of (first, count)."""
    found: list[tuple[int, int]] = []
    for frame in frames:
        if found and sum(found[-1]) == frame:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((frame, 1))
    return found
