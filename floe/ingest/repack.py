"""Keeping a tree within the number of packs that one mount can have.

Deduplication against many earlier pushes may spread a tree over more packs than that. Then the chunks in those packs
of which it uses least are fetched, checked and written anew, beside what is new.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from floe.ingest.entries import Chunk
from floe.ingest.packwriter import PackWriter
from floe.store import layout
from floe.store.errors import DamagedError, TransitDamageError
from floe.store.frames import decode_frame
from floe.store.ids import digest
from floe.store.nodes import blocks
from floe.store.objects.base import ObjectStore
from floe.store.packindex import BLOCK, PackIndex

_READS = 2  # of a chunk, before it counts as damaged


def limit_packs(
    chunks: Iterable[Chunk], own: Collection[str], writer: PackWriter, store: ObjectStore, *, limit: int, max_pack: int
) -> int:
    """Move chunks until these use at most `limit` packs; returns how many packs are no longer used.

    `own` packs were written in this push and stay; a pack holds at most `max_pack` bytes of content. Chunks stay the
    same objects: their places change. DamagedError when a chunk in the store is not what its digest says.
    """
    used = _stored_chunks(chunks, own)
    order = sorted(used, key=lambda pack_id: (sum(c.length for c in used[pack_id]), pack_id))
    moved = 0
    content = writer.open_content
    # The pack that is open, and what it overflows into, count as well.
    while order[moved:] and len(order) - moved + len(own) + _packs_for(content, max_pack) > limit:
        content += sum(blocks(c.length) * BLOCK for c in used[order[moved]])
        moved += 1
    for pack_id in order[:moved]:
        _move(pack_id, sorted(used[pack_id], key=lambda c: c.block), writer, store)
    return moved


def _packs_for(content: int, max_pack: int) -> int:
    # Packs do not fill to the last byte: a chunk that does not fit begins the next one.
    whole = -(-content // max_pack)
    return whole + (whole > 1)


def _stored_chunks(chunks: Iterable[Chunk], own: Collection[str]) -> dict[str, list[Chunk]]:
    used: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.pack_id and chunk.pack_id not in own:
            used.setdefault(chunk.pack_id, []).append(chunk)
    return used


def _move(pack_id: str, chunks: list[Chunk], writer: PackWriter, store: ObjectStore) -> None:
    index = PackIndex.decode(store.get(layout.pack_index_key(pack_id)), pack_id)
    for chunk in chunks:
        data = _read(pack_id, index, chunk, store)
        chunk.pack_id, chunk.block = "", 0
        writer.add(chunk, data)


def _read(pack_id: str, index: PackIndex, chunk: Chunk, store: ObjectStore) -> bytes:
    for _ in range(_READS):  # what was damaged on its way is fetched again
        try:
            data = _fetch(pack_id, index, chunk, store)
        except (TransitDamageError, DamagedError):
            continue
        if digest(data) == chunk.digest:
            return data
    key = layout.pack_key(pack_id)
    raise DamagedError(
        f"{key} in {store.url} does not hold the content that its index says",
        hint="run `floe fsck --deep --repair`, then try again: what it held and nobody has a copy of is stored anew",
    )


def _fetch(pack_id: str, index: PackIndex, chunk: Chunk, store: ObjectStore) -> bytes:
    start = chunk.block * BLOCK
    numbers = index.frame_range(start, chunk.length)
    offset, end = index.stored_offsets[numbers.start], index.stored_offsets[numbers.stop]
    stored = memoryview(store.get(layout.pack_key(pack_id), offset, end - offset))
    content = bytearray()
    for number in numbers:
        at = index.stored_offsets[number] - offset
        entry = index.frames[number]
        content += decode_frame(stored[at : at + entry.stored], entry, index.content_length(number)).content
    skip = start - numbers.start * index.frame_size
    return bytes(content[skip : skip + chunk.length])
