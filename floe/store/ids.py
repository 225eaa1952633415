"""Digests, chain ids and names: what they look like, how they are made and checked.

Floe's own objects are named by blake3-256, as 64 lowercase hex digits; OCI's by `sha256:<hex>`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from blake3 import blake3

from floe.store.errors import BadInputError

Buffer: TypeAlias = "bytes | bytearray | memoryview"

DIGEST_BYTES = 32
_HEX64 = re.compile(r"[0-9a-f]{64}")
_OCI = re.compile(r"sha256:[0-9a-f]{64}")
# BentoML 1.4's tag grammar (bentoml/_internal/tag.py): lower case, at most 63 characters.
_PART = re.compile(r"[a-z0-9]([-._a-z0-9]*[a-z0-9])?")
TAG_MAX = 63  # characters of a tag, and of each part of a name
DEFAULT_TAG = "latest"


def digest(data: Buffer) -> bytes:
    """The blake3-256 of `data`, 32 bytes."""
    return blake3(data).digest()


def hexdigest(data: Buffer) -> str:
    """The blake3-256 of `data` as 64 lowercase hex digits."""
    return blake3(data).hexdigest()


def is_hexdigest(text: str) -> bool:
    """Whether `text` is a Floe digest: 64 lowercase hex digits."""
    return _HEX64.fullmatch(text) is not None


def check_hexdigest(text: str, what: str = "digest", *, hint: str = "") -> str:
    """`text` itself; BadInputError when it is not a Floe digest."""
    if not is_hexdigest(text):
        raise BadInputError(f"{what} {text!r} is not 64 lowercase hex digits", hint=hint)
    return text


def is_oci_digest(text: str) -> bool:
    """Whether `text` is an OCI digest: `sha256:` and 64 lowercase hex digits."""
    return _OCI.fullmatch(text) is not None


def check_oci_digest(text: str, what: str = "digest") -> str:
    """`text` itself; BadInputError when it is not `sha256:` and 64 hex digits."""
    if not is_oci_digest(text):
        raise BadInputError(f"{what} {text!r} is not sha256:<64 lowercase hex digits>")
    return text


def check_text(text: str, what: str) -> str:
    """`text` itself; BadInputError when it came from bytes that are not UTF-8: JSON and OCI can only hold text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{what} {text!r} is not UTF-8", hint="use another name, in UTF-8") from error
    return text


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The OCI chain ids of layers, bottom first: ChainID(n) = sha256(ChainID(n-1) + " " + DiffID(n)).

    Source: OCI image-spec, config.md, "Layer ChainID".
    """
    chains: list[str] = []
    for diff_id in diff_ids:
        if not chains:
            chains.append(diff_id)
            continue
        text = f"{chains[-1]} {diff_id}".encode()
        chains.append("sha256:" + hashlib.sha256(text).hexdigest())
    return chains


@dataclass(frozen=True)
class ModelRef:
    """`NAME[:TAG]` or `NAME@DIGEST`; NAME is BentoML's grammar with an optional `org/` before it.

    Exactly one of `tag` and `digest` is set; `digest` is a manifest digest (64 hex digits).
    """

    name: str
    tag: str | None = DEFAULT_TAG
    digest: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Parse what a user typed; BadInputError says which part is wrong and what is allowed."""
        name, at, digest_text = text.partition("@")
        if at:
            _check_name(name, text)
            hint = f"give a whole digest: `floe model history {name}` and `floe model ls --json` print them"
            return cls(name, None, check_hexdigest(digest_text, "model digest", hint=hint))
        name, colon, tag = text.partition(":")
        _check_name(name, text)
        if not colon:
            return cls(name)
        _check_part(tag, "tag", text)
        return cls(name, tag)


def _check_name(name: str, text: str) -> str:
    parts = name.split("/")
    if len(parts) > 2:
        raise BadInputError(f"model name {text!r} is not valid: it has more than one '/'", hint="use [ORG/]NAME[:TAG]")
    for part in parts:
        _check_part(part, "name", text)
    return name


def _check_part(part: str, what: str, text: str) -> None:
    if _PART.fullmatch(part) is None or len(part) > TAG_MAX:
        raise BadInputError(
            f"model {what} {part!r} in {text!r} is not valid",
            hint=f"use lower case letters, digits and inner '-', '.', '_', at most {TAG_MAX} characters",
        )
