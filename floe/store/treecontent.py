"""Which frames of which packs a tree needs, in the order of its files. Pure.

A pack may hold content of several trees, and only what the tree's files refer to is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from floe.store.cache.bitmap import runs
from floe.store.erofs_inodes import Inodes
from floe.store.profilepaths import files
from floe.store.replay import Run

_HORIZON = 64 << 20  # bytes of content within which frames are put in the order of their packs, for few requests
_WHOLE = 8  # a pack of which not even an eighth is foreign is wanted as a whole


class Content(NamedTuple):
    """`runs` in the order of need, each frame once; `masks`: by pack, an integer with bit N set for frame N."""

    runs: tuple[Run, ...]
    masks: Mapping[str, int]


def content_of(image: Inodes, frame_sizes: Mapping[str, int], pause: Callable[[], object] = lambda: None) -> Content:
    """What the tree in `image` needs. `frame_sizes`: bytes, by pack; packs that are not in it are left out.

    Looks at every inode, some 5 microseconds each; `pause` is called now and then. DamagedError.
    """
    found: list[Run] = []
    seen: dict[str, set[int]] = {}
    batch: dict[str, list[int]] = {}
    left = _HORIZON
    for _, inode in files(image, pause):
        if not inode.size:
            continue
        bits = image.chunk_bits(inode)
        for pack_id, offset, length in image.chunks(inode, 0, -(-inode.size >> bits)):
            size = frame_sizes.get(pack_id or "", 0)
            if pack_id is None or not size:
                continue
            known = seen.setdefault(pack_id, set())
            for frame in range(offset // size, (offset + length - 1) // size + 1):
                if frame not in known:
                    known.add(frame)
                    batch.setdefault(pack_id, []).append(frame)
                    left -= size
            if left <= 0:
                found += _flush(batch)
                batch, left = {}, _HORIZON
    found += _flush(batch)
    return Content(tuple(found), {pack_id: _mask(frames) for pack_id, frames in seen.items()})


def whole_packs(masks: Iterable[Mapping[str, int]], counts: Mapping[str, int]) -> set[str]:
    """Packs that trees with these masks need so much of that the rest shall come too. `counts`: frames, by pack.

    A tree is mounted natively only when its packs are complete: a few frames that only an older version refers to shall not
    stand in the way, and many of another image shall not be fetched for it.
    """
    together: dict[str, int] = {}
    for wanted in masks:
        for pack_id, mask in wanted.items():
            together[pack_id] = together.get(pack_id, 0) | mask
    return {
        pack_id
        for pack_id, mask in together.items()
        if pack_id in counts and (counts[pack_id] - mask.bit_count()) * _WHOLE < counts[pack_id]
    }


def filled(content: Content, whole: Iterable[str], counts: Mapping[str, int]) -> Content:
    """`content` with what its packs among `whole` hold beside it, last."""
    more: list[Run] = []
    masks = dict(content.masks)
    for pack_id in whole:
        mask, full = masks.get(pack_id, 0), (1 << counts.get(pack_id, 0)) - 1
        if pack_id not in masks or mask == full:
            continue
        missing = [frame for frame in range(counts[pack_id]) if not mask >> frame & 1]
        more += [Run(pack_id, first, first + count) for first, count in runs(missing)]
        masks[pack_id] = full
    return Content((*content.runs, *more), masks)


def _flush(batch: Mapping[str, list[int]]) -> list[Run]:
    return [
        Run(pack_id, first, first + count) for pack_id, frames in batch.items() for first, count in runs(sorted(frames))
    ]


def _mask(frames: set[int]) -> int:
    bits = bytearray((max(frames) >> 3) + 1)
    for frame in frames:
        bits[frame >> 3] |= 1 << (frame & 7)
    return int.from_bytes(bits, "little")
