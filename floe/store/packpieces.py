"""A pack's object in pieces of whole frames, as it is read to the end, and what of a piece is not what the index says. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from floe.store.errors import TransitDamageError
from floe.store.frames import decode_frame
from floe.store.ids import Buffer
from floe.store.packindex import PackIndex

_PIECE = 8 << 20  # stored bytes read at once


@dataclass(frozen=True)
class Piece:
    """Frames `first` to `last` of a pack, without the latter: stored bytes [start, start + size)."""

    first: int
    last: int
    start: int
    size: int

    def wrong(self, index: PackIndex, data: Buffer) -> list[int]:
        """Numbers of the frames that do not match their digests; those that `data`, from `start` on, is too short for are among them."""
        view, found = memoryview(data), []
        for number in range(self.first, self.last):
            entry, at = index.frames[number], index.stored_offsets[number] - self.start
            stored = view[at : at + entry.stored]
            try:
                if len(stored) == entry.stored:
                    decode_frame(stored, entry, index.content_length(number))
                    continue
            except TransitDamageError:
                pass
            found.append(number)
        return found


def pieces(index: PackIndex) -> Iterator[Piece]:
    """A pack in pieces of some MiB, frames whole."""
    offsets, first = index.stored_offsets, 0
    for frame in range(1, len(index.frames) + 1):
        if frame == len(index.frames) or offsets[frame + 1] - offsets[first] > _PIECE:
            yield Piece(first, frame, offsets[first], offsets[frame] - offsets[first])
            first = frame
