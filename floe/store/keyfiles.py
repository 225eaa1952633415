"""Keys on this machine's disk: made, read, and never shown but for what is public.

A private key is a file in PEM (PKCS #8) that nobody but its owner may read; beside it lies the public one, `FILE.pub`, a
line of text. Trusted keys are such lines, in the settings themselves or in files that nobody but their owner may write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from floe.store.errors import AccessDeniedError, AlreadyExistsError, BadInputError, FloeError, NoSpaceError
from floe.store.signing import PUBLIC, SHORT, PublicKey, Signer, Trust

_MAX_FILE = 64 << 10  # bytes; a private key has some 120, a public one 52
_SUFFIX = ".pub"


def create_key(path: Path) -> PublicKey:
    """Make a key: `path` (mode 0600) and `path`.pub. AlreadyExistsError when either is there; nothing is replaced."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415 - some 30 ms
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - likewise
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    public_path = path.with_name(path.name + _SUFFIX)
    for each in (path, public_path):
        if os.path.lexists(each):
            raise AlreadyExistsError(f"{each} is there already", hint="give another name; no key is ever replaced")
    key = Ed25519PrivateKey.generate()
    public = Signer(key).public
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    try:
        _write(public_path, f"{public} {path.name} {public.id[:SHORT]}\n".encode(), 0o644)
    except BaseException:
        path.unlink()
        raise
    return public


def read_signer(path: Path) -> Signer:
    """The private key in a file. AccessDeniedError when others may read it; BadInputError when it is none."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - some 30 ms, only where keys are used
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415 - likewise
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415 - likewise

    data = _read(path, "private key", 0o077, f"chmod 600 {path}")
    problem = ""
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        problem = "has a passphrase, which Floe cannot ask for"
    except (ValueError, UnsupportedAlgorithm):
        problem = "is no private key in PEM"
    else:
        if isinstance(key, Ed25519PrivateKey):
            return Signer(key)
        problem = "is no Ed25519 key"
    # Outside the handlers: the library's own words may quote what it read.
    raise BadInputError(f"{path} {problem}", hint="`floe key create FILE` makes one")


def load_trust(sources: Iterable[str]) -> Trust | None:
    """The keys that `sources` name: public keys, files of them, directories of `*.pub` files. None when nothing is named.

    BadInputError when something is named that holds no key: an empty directory must not mean that all is trusted.
    """
    keys: list[PublicKey] = []
    listed = list(sources)
    for source in listed:
        found = [PublicKey.parse(source)] if source.startswith(PUBLIC) else _keys_at(Path(source))
        if not found:
            raise BadInputError(
                f"{source} holds no public key", hint="put a *.pub file there, or take it off trusted_keys"
            )
        keys += found
    return Trust(keys) if listed else None


def public_key_at(path: Path) -> PublicKey:
    """The public key of a private key's file, or in a public one."""
    if path.name.endswith(_SUFFIX):
        found = _keys_in(path)
        if len(found) == 1:
            return found[0]
        raise BadInputError(f"{path} holds {len(found)} public keys, not one")
    return read_signer(path).public


def _keys_at(path: Path) -> list[PublicKey]:
    if not path.is_dir():
        return _keys_in(path)
    try:
        files = sorted(child for child in path.iterdir() if child.name.endswith(_SUFFIX))
    except OSError as error:
        raise AccessDeniedError(f"the trusted keys in {path} cannot be listed: {error.strerror}") from error
    return [key for file in files for key in _keys_in(file)]


def _keys_in(path: Path) -> list[PublicKey]:
    text = _read(path, "public key", 0o022, f"chmod go-w {path}").decode(errors="replace")
    lines = (line.strip() for line in text.splitlines())
    try:
        return [PublicKey.parse(line) for line in lines if line and not line.startswith("#")]
    except BadInputError as error:
        # Whoever names the private key by mistake must not find it in a log.
        raise BadInputError(f"{path} has a line that is no public key", hint=error.hint) from None


def _read(path: Path, what: str, forbidden: int, remedy: str) -> bytes:
    """A small file of ours: AccessDeniedError when its mode has a bit of `forbidden`, or it belongs to somebody else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        kind: type[FloeError] = AccessDeniedError if isinstance(error, PermissionError) else BadInputError
        raise kind(f"the {what} {path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BadInputError(f"the {what} {path} is no regular file")
        if found.st_mode & forbidden or found.st_uid not in (0, os.geteuid()):
            mode = stat.S_IMODE(found.st_mode)
            raise AccessDeniedError(
                f"the {what} {path} is open to others: mode {mode:04o}, owner {found.st_uid}", hint=remedy
            )
        return file.read(_MAX_FILE)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} is there already", hint="give another name") from error
    except OSError as error:
        kind: type[FloeError] = AccessDeniedError if isinstance(error, PermissionError) else BadInputError
        hint = "give a file in a directory that you may write to"
        if isinstance(error, FileNotFoundError):
            hint = f"make the directory first: mkdir -p {path.parent}"
        raise kind(f"{path} cannot be written: {error.strerror}", hint=hint) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NoSpaceError(f"{path} cannot be written: {error.strerror}") from error
