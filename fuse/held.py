"""How much of what is wanted is in the cache: frames as masks of their packs, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from floe.store.cache import Writer
from floe.store.errors import FloeError
from floe.store.frames import FrameTable


class FrameSizes(dict[str, int]):
    """Frame sizes by pack, looked up when they are asked for; 0 for packs that are not known here."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer

    def get(self, key: str, default: Any = 0) -> Any:
        """Bytes of a frame of the pack `key`."""
        if key not in self:
            table = table_of(self._writer, key) if key else None
            self[key] = default if table is None else table.frame_size
        return self[key]


def table_of(writer: Writer, pack_id: str) -> FrameTable | None:
    """A pack's frames; None when its index is not here, or cannot be read."""
    try:
        return writer.table(pack_id)
    except FloeError:  # the disk; who reads it is told
        return None


def frame_counts(writer: Writer, masks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Frames, by pack, of the packs in `masks`."""
    packs = {pack_id for of_tree in masks for pack_id in of_tree}
    return {pack_id: table.count for pack_id in packs if (table := table_of(writer, pack_id)) is not None}


def verified(writer: Writer, masks: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of content of the frames in `masks`, and how many of them are in the cache and verified."""
    wanted = held = 0
    for pack_id, mask in masks.items():
        table = table_of(writer, pack_id)
        if table is None:
            continue
        wanted += bytes_of(mask, table.frame_size, table.content_size)
        pack = writer.pack(pack_id)
        if pack is not None:
            held += bytes_of(mask & _plane(pack.bits.trusted), table.frame_size, table.content_size)
    return wanted, held


def bytes_of(mask: int, frame_size: int, size: int) -> int:
    """Content bytes of the frames in `mask`, of a pack of `size` bytes."""
    last = -(-size // frame_size) - 1
    short = (last + 1) * frame_size - size if mask >> last & 1 else 0
    return mask.bit_count() * frame_size - short


def _plane(bits: bytearray) -> int:
    return int.from_bytes(bits, "little")
