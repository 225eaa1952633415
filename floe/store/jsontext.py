"""JSON that others wrote, read within bounds. Pure."""

from __future__ import annotations

import json
from typing import Any

from floe.store.ids import Buffer

BYTES_MAX = 4 << 20  # of a text; a manifest of 256 packs takes 60 KiB
DEPTH_MAX = 32  # objects and lists within each other; Floe's records have four
_DIGITS_MAX = 19  # of a whole number: 63 bits


def parse(data: Buffer, limit: int = BYTES_MAX) -> Any:
    """The value in `data`, which is UTF-8 of at most `limit` bytes.

    ValueError for anything else, and for what two readers may read differently: a key twice in one object, NaN and
    infinities, numbers beyond 63 bits, and lists or objects more than DEPTH_MAX deep.
    """
    text = bytes(data) if len(data) <= limit else b""
    if not text:
        raise ValueError(f"{len(data)} bytes; 1 to {limit} are read")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_int=_int)
    except RecursionError:
        raise ValueError(f"it is more than {DEPTH_MAX} deep") from None
    _check_depth(value)
    return value


def shown(value: object, most: int = 60) -> str:
    """A parsed value for a message, cut short."""
    text = ascii(value)
    return text if len(text) <= most else text[:most] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _int(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        level = [
            item
            for inner in level
            if isinstance(inner, (dict, list))
            for item in (inner.values() if isinstance(inner, dict) else inner)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is more than {DEPTH_MAX} deep")
