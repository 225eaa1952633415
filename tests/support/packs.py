"""Packs and trees made from bytes, put into an object store the way a push does."""

from __future__ import annotations

import random
from dataclasses import dataclass

from floe.store import layout
from floe.store.frames import encode_frame
from floe.store.objects.base import ObjectStore
from floe.store.packindex import LAYER_FRAME, PackIndex


@dataclass(frozen=True)
class TestPack:
    """A pack: its id, content, index, and the object as stored."""

    __test__ = False

    id: str
    content: bytes
    index: PackIndex
    stored: bytes

    def __repr__(self) -> str:  # its own, as hypothesis would print megabytes, whatever `field` says
        return f"TestPack(id={self.id!r})"

    def publish(self, store: ObjectStore) -> TestPack:
        store.put(layout.pack_key(self.id), self.stored)
        store.put(layout.pack_index_key(self.id), self.index.encode())
        return self


def make_pack(content: bytes, frame_size: int = LAYER_FRAME) -> TestPack:
    """A pack of `content`, whose length must be a multiple of 4096."""
    stored, entries = [], []
    for start in range(0, len(content), frame_size):
        data, entry = encode_frame(content[start : start + frame_size])
        stored.append(bytes(data))
        entries.append(entry)
    index = PackIndex(frame_size, len(content), tuple(entries))
    return TestPack(index.pack_id, content, index, b"".join(stored))


def random_content(size: int, seed: int = 0, *, compressible: bool = False) -> bytes:
    """`size` bytes that are the same for the same seed; every 4 KiB block is different."""
    source = random.Random(f"floe {seed}")
    if not compressible:
        return source.randbytes(size)
    return b"".join(source.randbytes(64).ljust(4096, b"=") for _ in range(size // 4096))
