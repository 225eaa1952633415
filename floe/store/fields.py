"""The fields of JSON objects, checked as they are read. Pure.

Each check returns the value it was given; ValueError says which field is wrong and what it should be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from floe.store.ids import is_hexdigest, is_oci_digest
from floe.store.jsontext import shown

T = TypeVar("T")
Check: TypeAlias = Callable[[Any, str], T]
_SURROGATES = re.compile("[\ud800-\udfff]")
ITEMS_MAX = 4096  # of a list; an image has some dozen layers, a manifest 256 packs


def text(value: Any, name: str) -> str:
    """Any text that UTF-8 can hold."""
    _expect(value, name, isinstance(value, str) and not _SURROGATES.search(value), "a text")
    return str(value)


def hexdigest(value: Any, name: str) -> str:
    """A digest of Floe's."""
    _expect(value, name, isinstance(value, str) and is_hexdigest(value), "64 hex digits")
    return str(value)


def oci_digest(value: Any, name: str) -> str:
    """A digest of OCI's."""
    _expect(value, name, isinstance(value, str) and is_oci_digest(value), "sha256: and 64 hex digits")
    return str(value)


def count(value: Any, name: str) -> int:
    """A number of bytes or of things."""
    _expect(value, name, isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number")
    return int(value)


def mapping(value: Any, name: str, *required: str) -> dict[str, Any]:
    """An object that has at least the `required` fields."""
    _expect(value, name, isinstance(value, dict), "an object")
    for key in required:
        if key not in value:
            raise ValueError(f"{name} has no {key!r}")
    return dict(value)


def texts(value: Any, name: str) -> dict[str, str]:
    """An object whose values are texts."""
    return {text(key, f"a key of {name}"): text(item, f"{name}.{key}") for key, item in mapping(value, name).items()}


def each(value: Any, name: str, check: Check[T], *, most: int = ITEMS_MAX) -> tuple[T, ...]:
    """A list of at most `most` items, every one checked."""
    _expect(value, name, isinstance(value, list), "a list")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} items; at most {most} are read")
    return tuple(check(item, f"{name}[{number}]") for number, item in enumerate(value))


def _expect(value: Any, name: str, fits: bool, wanted: str) -> None:  # noqa: FBT001 - private, and reads well
    if not fits:
        raise ValueError(f"{name} is {shown(value)}, not {wanted}")
