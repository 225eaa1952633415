"""The setting `trusted_keys`: where the keys are whose signatures count. They are read by whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from floe.store.errors import BadInputError

_NONE = "none"
_PUBLIC = "ed25519:"  # floe.store.signing.PUBLIC, which this module must not import: every command reads settings


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys and absolute paths, in the order in which they were given; the text of it is what `parse` takes."""

    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ",".join(self.sources) or _NONE

    @classmethod
    def parse(cls, value: object) -> TrustedKeys:
        """From the file's list of texts, or one text with commas between them; `none` for none. BadInputError."""
        if value == _NONE:
            return cls()
        items = value.split(",") if isinstance(value, str) else value
        if (
            not isinstance(items, list)
            or not items
            or not all(isinstance(item, str) and item.strip() for item in items)
        ):
            raise BadInputError(f"{value!r} names no keys", hint=_hint())
        return cls(tuple(_source(item.strip()) for item in items))


def _source(text: str) -> str:
    if text.startswith(_PUBLIC):
        return text
    if not text.startswith(("/", "~")) or "," in text:
        # Not made absolute: a settings file has no directory that daemons and commands share.
        hint = f"give the whole path: {Path(text).absolute()}" if Path(text).exists() else _hint()
        raise BadInputError(f"{text!r} is neither a public key nor an absolute path", hint=hint)
    return str(Path(text).expanduser())


def _hint() -> str:
    return 'write ["ed25519:...", "/etc/floe/trusted"]: public keys, files of them, directories of *.pub files'
