"""Signatures: who vouches for what a name stands for. Pure; docs/FORMAT.md, "Signatures", has the signed bytes.

Ed25519 (RFC 8032) by the `cryptography` package, which is imported when a key is first used: a process without keys
neither waits for it nor holds it in memory.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from floe.store.errors import BadInputError, UntrustedError
from floe.store.ids import ModelRef, hexdigest
from floe.store.records import KIND_LAYER, KIND_MODEL, Signature, canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KIND_TREE = "tree"
# Nothing else that these keys may ever sign begins so.
DOMAIN = b"floe.signature.v1\0"
# How a public key is written: this, then 32 bytes in base64; a remark may follow after a space.
PUBLIC = "ed25519:"
PUBLIC_BYTES, SIGNATURE_BYTES = 32, 64
# Signatures of one thing: rotation takes two or three, and whoever reads tries them all.
MAX_SIGNATURES = 16
SHORT = 16  # hex digits of a key's id, for people


@dataclass(frozen=True)
class Statement:
    """What is signed: that `name` stands for `target`, both read as `kind` says.

    A layer's diff id and a model's NAME:TAG stand for a manifest's digest; a tree, which has no name, for its own.
    """

    kind: str
    name: str
    target: str

    @classmethod
    def layer(cls, diff_id: str, manifest: str) -> Statement:
        """The layer with this diff id is what the manifest says."""
        return cls(KIND_LAYER, diff_id, manifest)

    @classmethod
    def model(cls, ref: ModelRef, manifest: str) -> Statement:
        """The model's tag means this manifest."""
        return cls(KIND_MODEL, str(ref), manifest)

    @classmethod
    def tree(cls, tree: str) -> Statement:
        """This tree may be mounted where something else that is trusted names it by digest."""
        return cls(KIND_TREE, "", tree)

    def __str__(self) -> str:
        return f"{self.kind} {self.name or self.target}"

    def signed_bytes(self, signed: str) -> bytes:
        """What is signed at the time `signed`, byte by byte."""
        value = {"kind": self.kind, "name": self.name, "signed": signed, "target": self.target}
        return DOMAIN + canonical_json(value)


@dataclass(frozen=True)
class PublicKey:
    """The 32 bytes of an Ed25519 public key."""

    raw: bytes

    @property
    def id(self) -> str:
        """blake3 of the key's bytes, in hex."""
        return hexdigest(self.raw)

    def __str__(self) -> str:
        return PUBLIC + base64.b64encode(self.raw).decode()

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """A key as `str` gives it, with or without a remark behind; BadInputError."""
        word = text.split(maxsplit=1)[0] if text.strip() else ""
        try:
            raw = base64.b64decode(word.removeprefix(PUBLIC), validate=True)
        except (ValueError, binascii.Error):
            raw = b""
        if not word.startswith(PUBLIC) or len(raw) != PUBLIC_BYTES:
            raise BadInputError(
                f"{word[:60]!r} is not a public key", hint=f"`floe key show FILE` prints it: {PUBLIC}<44 characters>"
            )
        return cls(raw)

    def made(self, signature: Signature, statement: Statement) -> bool:
        """Whether this key made the signature, of exactly this statement."""
        if signature.key != self.id:
            return False
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - some 30 ms, only where keys are used
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415 - likewise

        try:
            raw = base64.b64decode(signature.signature, validate=True)
            Ed25519PublicKey.from_public_bytes(self.raw).verify(raw, statement.signed_bytes(signature.signed))
        except (InvalidSignature, ValueError):
            return False
        return True


class Signer:
    """A private key. Nothing of it but the id is ever shown."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"Signer({self.public.id[:SHORT]})"

    def sign(self, statement: Statement, signed: str) -> Signature:
        """Vouch for a statement at the time `signed` (RFC 3339, UTC)."""
        raw = self._key.sign(statement.signed_bytes(signed))
        return Signature(self.public.id, base64.b64encode(raw).decode(), signed)


class Trust:
    """Keys whose word counts: any one of them is enough. Immutable."""

    def __init__(self, keys: Iterable[PublicKey]) -> None:
        self._keys = {key.id: key for key in keys}

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the keys, in their order."""
        return tuple(self._keys)

    def adding(self, key: PublicKey) -> Trust:
        """These keys and one more."""
        return Trust([*self._keys.values(), key])

    def signers(self, statement: Statement, signatures: Sequence[Signature]) -> list[str]:
        """The ids of those keys that vouch for the statement, each once."""
        found = [
            signature.key
            for signature in signatures[:MAX_SIGNATURES]
            if (key := self._keys.get(signature.key)) is not None and key.made(signature, statement)
        ]
        return list(dict.fromkeys(found))

    def check(self, statement: Statement, signatures: Sequence[Signature]) -> None:
        """UntrustedError unless one of the keys vouches for the statement; it says what there is instead."""
        if self.signers(statement, signatures):
            return
        of_ours = [signature.key for signature in signatures if signature.key in self._keys]
        if not signatures:
            problem = "is not signed"
        elif not of_ours:
            problem = f"is signed by keys that are not trusted here ({_short(s.key for s in signatures)})"
        else:
            problem = f"has a signature of {_short(of_ours)} that was made for something else, or altered"
        raise UntrustedError(
            f"{statement} {problem}",
            hint="have it signed by a key of trusted_keys; if it was, somebody else has changed what the store names",
        )


def _short(keys: Iterable[str]) -> str:
    listed = list(dict.fromkeys(ascii(key[:SHORT])[1:-1] for key in keys))
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
