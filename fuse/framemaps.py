"""Which frames of packs are here, which were asked for, and which came ahead of need: for pictures of what is mounted.

Readers mark what they ask for, a byte a frame, without a lock: assigning to a slice of its own length is atomic in CPython.
Nothing of it outlives the worker, and what the kernel's page cache answers, or a native mount, never comes by here.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from floe.store.cache import Writer
from floe.store.cache.bitmap import Bitmap
from floe.store.errors import FloeError

ANSWER_BYTES = 512 << 10  # of one answer, some; a pack of 4 GiB in frames of 128 KiB makes 16 KiB at most
_DIGITS = bytes.maketrans(b"\0\1", b"01")


class Touched:
    """Frames asked for since this worker's start. `frames_of` a pack: the bytes of a frame and how many there are; None: not known.

    Thread-safe.
    """

    def __init__(self, frames_of: Callable[[str], tuple[int, int] | None]) -> None:
        self._frames_of = frames_of
        self._marks: dict[str, tuple[int, bytearray]] = {}
        self._lock = threading.Lock()

    def note(self, pack_id: str, offset: int, length: int) -> None:
        """`length` bytes of content at `offset` were asked for."""
        known = self._marks.get(pack_id) or self._learn(pack_id)
        if known is None or length <= 0:
            return
        shift, marks = known
        first, last = offset >> shift, offset + length - 1 >> shift
        if first == last < len(marks):  # as nearly always
            marks[first] = 1
        elif first < (end := min(len(marks), last + 1)):
            marks[first:end] = b"\1" * (end - first)

    def bits(self, pack_id: str) -> int:
        """A bit for each frame that was asked for, the first frame lowest."""
        known = self._marks.get(pack_id)
        return int(bytes(known[1]).translate(_DIGITS)[::-1], 2) if known is not None else 0

    def _learn(self, pack_id: str) -> tuple[int, bytearray] | None:
        found = self._frames_of(pack_id)
        if found is None:
            return None
        frame_size, count = found
        with self._lock:
            return self._marks.setdefault(pack_id, (frame_size.bit_length() - 1, bytearray(count)))


class FrameMaps:
    """Maps of the packs that `writer` has; `touched` are its readers', `pinned` the packs that stay. Made at the worker's start."""

    def __init__(self, writer: Writer, touched: Touched, pinned: Callable[[], Container[str]]) -> None:
        self._writer = writer
        self._touched = touched
        self._pinned = pinned
        self._before: Mapping[str, int] = {pack_id: _here(pack.bits) for pack_id, pack in list(writer.packs.items())}

    def answer(self, pack_ids: Sequence[str]) -> dict[str, Any]:
        """`packs`: maps by pack id, of packs known here; `left`: those of `pack_ids` for which there was no room in ANSWER_BYTES.

        A map has `content_bytes`, `frame_bytes`, `pinned`, and three planes of a bit for each frame, lowest bit first, in base64:
        `here`, `touched` (asked for by readers) and `ahead` (here, came since the worker's start, and nobody asked for it).
        """
        found: dict[str, dict[str, Any]] = {}
        room = ANSWER_BYTES
        pinned = self._pinned()
        for position, pack_id in enumerate(pack_ids):
            if room <= 0:
                return {"packs": found, "left": list(pack_ids[position:])}
            one = self._map(pack_id, pack_id in pinned)
            if one is not None:
                found[pack_id] = one
                room -= 256 + sum(len(one[plane]) for plane in ("here", "touched", "ahead"))
        return {"packs": found, "left": []}

    def _map(self, pack_id: str, pinned: bool) -> dict[str, Any] | None:  # noqa: FBT001 - private
        frames = frames_of(self._writer, pack_id)
        if frames is None:
            return None
        frame_bytes, count = frames
        pack = self._writer.packs.get(pack_id)
        here = 0 if pack is None else _here(pack.bits)
        touched = self._touched.bits(pack_id)
        ahead = here & ~touched & ~self._before.get(pack_id, 0)
        return {
            "content_bytes": self._writer.cache.content_size(pack_id) or 0,
            "frame_bytes": frame_bytes,
            "pinned": pinned,
            "here": _plane(here, count),
            "touched": _plane(touched, count),
            "ahead": _plane(ahead, count),
        }


def frames_of(writer: Writer, pack_id: str) -> tuple[int, int] | None:
    """Bytes of a frame of a pack, and how many it has; None when its index is not on this node."""
    try:
        table = writer.table(pack_id)
    except FloeError:  # the disk; who reads it is told
        return None
    return None if table is None else (table.frame_size, table.count)


def _here(bits: Bitmap) -> int:
    return int.from_bytes(bits.trusted, "little") | int.from_bytes(bits.suspect, "little")


def _plane(bits: int, count: int) -> str:
    return b64encode(bits.to_bytes(-(-count // 8), "little")).decode() if bits else ""
