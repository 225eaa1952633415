"""The frames of a tree's packs as a row of cells: what a page or a terminal can draw. Pure."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CELLS = 160  # of a tree, some: each of its packs has one at least
_MOST = 512  # of a tree
_LEVELS = 9  # a cell says in so many steps how much of it is so


class Cells(NamedTuple):
    """A character for each cell: `here`, `touched` and `ahead` are digits, 0 for none to 9 for all of its frames, `pinned` 0 or 1.

    What is touched and what came ahead of need is among what is here.
    """

    here: str = ""
    touched: str = ""
    ahead: str = ""
    pinned: str = ""


def cells_of(packs: Sequence[Mapping[str, Any]], cells: int = CELLS) -> Cells:
    """The cells of packs, in their order, out of their maps as PackfsClient.frames gives them."""
    whole = sum(pack["content_bytes"] for pack in packs)
    rows: list[tuple[str, str, str, str]] = []
    for pack in packs[:_MOST]:
        frames = -(-pack["content_bytes"] // pack["frame_bytes"])
        count = max(1, min(frames, pack["content_bytes"] * cells // whole if whole else 1))
        here = _plane(pack["here"])
        planes = [here, _plane(pack["touched"]) & here, _plane(pack["ahead"]) & here]
        levels = (_levels(plane, frames, count) for plane in planes)
        rows.append((*levels, ("1" if pack["pinned"] else "0") * count))
    return Cells(*("".join(parts) for parts in zip(*rows, strict=True)))


def _plane(text: str) -> int:
    return int.from_bytes(b64decode(text), "little")


def _levels(plane: int, frames: int, count: int) -> str:
    if not plane:
        return "0" * count
    found = []
    for cell in range(count):
        first, end = cell * frames // count, (cell + 1) * frames // count
        most = end - first
        set_ = (plane >> first & (1 << most) - 1).bit_count()
        # Some is never drawn as none, and all but some never as all.
        level = _LEVELS if set_ == most else min(_LEVELS - 1, max(1, round(_LEVELS * set_ / most))) if set_ else 0
        found.append(str(level))
    return "".join(found)
