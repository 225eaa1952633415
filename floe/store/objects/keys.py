"""What a key may look like, and what a range means. Pure; shared by every object store."""

from __future__ import annotations

import re

from floe.store.errors import BadInputError, DamagedError

MAX_KEY = 1024  # bytes; S3's limit
MAX_PART = 255  # bytes; a file name's limit
WHOLE_MAX = (1 << 30) + (
    1 << 12
)  # bytes of an object that is read whole: of the largest tree; packs are read in ranges
# Safe as a file name, in a URL and in every S3 client. A dot at the start is the file store's own (`.tmp`, `.lock`).
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_key(key: str) -> str:
    """`key` itself; BadInputError unless it is `part/part/...` of letters, digits and inner `-`, `.`, `_`."""
    for part in key.split("/"):
        if _PART.fullmatch(part) is None or len(part) > MAX_PART:
            raise BadInputError(f"object key {key!r} is not valid")
    if len(key) > MAX_KEY:
        raise BadInputError(f"object key {key!r} is longer than {MAX_KEY} bytes")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` without a slash at its end; BadInputError unless it is empty (everything) or like a key."""
    prefix = prefix.rstrip("/")
    return check_key(prefix) if prefix else ""


def range_length(key: str, size: int, start: int, length: int | None) -> int:
    """Bytes that a read of [start, start + length) of an object of `size` bytes returns: all of them or an error.

    Raises DamagedError when the object is too short: what pointed into it (a pack index) says it is longer.
    """
    check_range(key, start, length)
    wanted = max(size - start, 0) if length is None else length
    if start + wanted > size:
        raise short_object(key, start, wanted, size)
    return wanted


def check_range(key: str, start: int, length: int | None) -> None:
    """BadInputError for a negative start or length."""
    if start < 0 or (length is not None and length < 0):
        raise BadInputError(f"range of {key} starts at {start} with length {length}")


def short_object(key: str, start: int, length: int, size: int | None = None) -> DamagedError:
    """The error for a range past the end of an object."""
    known = "is shorter" if size is None else f"has only {size}"
    return DamagedError(
        f"{key} {known}: bytes {start} to {start + length} were asked for",
        hint="the stored object is truncated: push its model or index its image again",
    )


def check_whole(key: str, size: object) -> None:
    """DamagedError when an object is too large to be read whole, into memory."""
    if not isinstance(size, int) or size > WHOLE_MAX:
        raise DamagedError(
            f"{key} is {size} bytes; what is read whole has at most {WHOLE_MAX}",
            hint="push its model or index its image again",
        )
