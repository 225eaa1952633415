"""One request whose answer is read in a thread, frame by frame, into the memory in which the frames stay.

A frame is verified and handed out as soon as its last byte is here, so that a reader does not wait for the request's end.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from floe.store.blocks import Blocks
from floe.store.errors import FloeError, RangeError, TransitDamageError
from floe.store.frames import VerifiedFrame, decode_frame
from floe.store.objects.base import Range
from floe.store.packindex import CODEC_RAW
from floe.store.reading import Get

_log = logging.getLogger(__name__)
_PIECE = 1 << 20  # bytes read at a time of frames that are stored compressed

Open = Callable[[str, int, int], Range]


class FrameStream:
    """Frames [first, first + count) of `get`, from the object `key` that `open_range` opens.

    `arrived` is told each verified frame, in the thread. Afterwards `passed` frames are dealt with, those in `failed` did not match
    their digests, `received` bytes came, and `error` is why not all of them.
    """

    def __init__(
        self,
        get: Get,
        first: int,
        count: int,
        *,
        key: str,
        open_range: Open,
        blocks: Blocks,
        arrived: Callable[[int, VerifiedFrame], None],
    ) -> None:
        self._table = get.table
        self._pack_id = get.pack_id
        self._first = first
        self._stop = first + count
        self._key = key
        self._open = open_range
        self._blocks = blocks
        self._arrived = arrived
        self._range: Range | None = None
        self._aborted = False
        self.passed = 0
        self.received = 0
        self.error: FloeError | None = None
        self.failed: list[int] = []

    def run(self) -> None:
        """Read to the end, or to where that fails: what is missing then has to come another way."""
        try:
            start, length = self._table.stored_range(self._first, self._stop - self._first)
            with contextlib.closing(self._open(self._key, start, length)) as opened:
                self._range = opened
                for first, stop in self._pieces():
                    if self._aborted:
                        return
                    self._read(opened, first, stop)
        except FloeError as error:
            if not isinstance(error, RangeError):  # no failure: it comes another way
                self.error = error
            _log.debug("pack %s: %s", self._pack_id, error)

    def abort(self) -> None:
        """Nobody wants the rest; from any thread."""
        self._aborted = True
        opened = self._range
        if opened is not None:
            opened.abort()

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(first, stop) of frames to be read together: a raw one alone, compressed ones up to _PIECE bytes."""
        first = self._first
        while first < self._stop:
            stop = first + 1
            if self._table.entry(first).codec != CODEC_RAW:
                while (
                    stop < self._stop
                    and self._table.entry(stop).codec != CODEC_RAW
                    and self._table.stored_range(first, stop + 1 - first)[1] <= _PIECE
                ):
                    stop += 1
            yield first, stop
            first = stop

    def _read(self, opened: Range, first: int, stop: int) -> None:
        size = self._table.stored_range(first, stop - first)[1]
        if self._table.entry(first).codec == CODEC_RAW:
            memory = self._blocks.take(size)
            opened.readinto(memory)
            self.received += size
            self._hand_out(first, memory.toreadonly(), None)
            return
        memory = memoryview(bytearray(size))
        opened.readinto(memory)
        self.received += size
        for frame in range(first, stop):
            length = self._table.stored_range(frame)[1]
            self._hand_out(frame, memory[:length], self._blocks.take(self._table.content_length(frame)))
            memory = memory[length:]

    def _hand_out(self, frame: int, stored: memoryview, into: memoryview | None) -> None:
        try:
            verified = decode_frame(stored, self._table.entry(frame), self._table.content_length(frame), into)
        except TransitDamageError as error:
            _log.warning("frame %d of pack %s: %s", frame, self._pack_id, error)
            self.failed.append(frame)
        else:
            self._arrived(frame, verified)
        self.passed += 1
