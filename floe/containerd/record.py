"""What was done to a configuration file, kept beside it so that it can be undone byte for byte.

    FILE.before-floe     the file as it was, with its mode and owner
    FILE.floe.json       what was written, and which keys Floe gave which value

Both are there before the file itself is replaced, and go after it was put back: whatever is interrupted, the next run
sees from the digests how far it came.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from floe.containerd.wanted import Append, Change, Keys, Set
from floe.store.cache.durable import sync_folder, write_all
from floe.store.errors import AccessDeniedError, BusyError, DamagedError, DiskError, FloeError, NoSpaceError

_VERSION = 1
_KINDS: dict[int, dict[str, type[Set | Append]]] = {_VERSION: {"set": Set, "append": Append}}


@dataclass(frozen=True)
class Record:
    """`before`, `after`: SHA-256 of the file without and with Floe's keys; `before` is None when there was no file.

    `changes`: with what stood there before, None for nothing; `made`: tables that were not there; `blocks`: those that
    stand below everything else, as text.
    """

    before: str | None
    after: str
    runtime: str | None
    changes: list[tuple[Change, Any]] = field(default_factory=list)
    made: list[Keys] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        """As JSON."""
        changes = [{"do": type(change).__name__.lower(), **asdict(change), "old": old} for change, old in self.changes]
        found = {"version": _VERSION, **asdict(self), "changes": changes}
        return (json.dumps(found, indent=2) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Record:
        """The inverse. DamagedError."""
        try:
            found = json.loads(data)
            changes: list[tuple[Change, Any]] = []
            for entry in found["changes"]:
                kind: type[Set | Append] = _KINDS[found["version"]][entry["do"]]
                changes.append((kind(tuple(entry["path"]), entry["value"]), entry["old"]))
            made = [tuple(keys) for keys in found["made"]]
            return cls(found["before"], found["after"], found["runtime"], changes, made, list(found["blocks"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{path} cannot be read: {error}", hint="the file as it was before is beside it, as *.before-floe"
            ) from error


class Kept:
    """The file `path`, symlinks resolved, with its record and backup. AccessDeniedError, NoSpaceError, DiskError."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        self.backup = self.path.with_name(self.path.name + ".before-floe")
        self._record = self.path.with_name(self.path.name + ".floe.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by whoever changes the file. BusyError at once when another Floe does."""
        with _errors(self.path):
            fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another floe changes {self.path}", hint="try again when it has ended") from None
            yield
        finally:
            os.close(fd)

    def read(self) -> bytes | None:
        """What the file holds; None when there is none."""
        return self._read(self.path)

    def read_backup(self) -> bytes | None:
        """The file as it was."""
        return self._read(self.backup)

    def read_record(self) -> Record | None:
        """What was done; None when nothing was, or all was undone. DamagedError."""
        data = self._read(self._record)
        return None if data is None else Record.decode(data, self._record)

    def keep(self, before: bytes | None, record: Record) -> None:
        """Write backup and record, durably, before the file itself is written."""
        with _errors(self.path):
            if before is None:
                self.backup.unlink(missing_ok=True)
            else:
                _replace(self.backup, before, like=self.path)
            _replace(self._record, record.encode(), like=self.path)

    def write(self, data: bytes | None) -> None:
        """Replace the file at once, or remove it; mode and owner stay."""
        with _errors(self.path):
            if data is None:
                self.path.unlink(missing_ok=True)
                sync_folder(self.path.parent)
            else:
                _replace(self.path, data, like=self.path)

    def forget(self) -> None:
        """Remove record and backup: the file is as it was."""
        with _errors(self.path):
            self._record.unlink(missing_ok=True)
            self.backup.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def _read(self, path: Path) -> bytes | None:
        with _errors(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None


def digest(data: bytes | None) -> str | None:
    """Of a file's content; None for no file."""
    return None if data is None else hashlib.sha256(data).hexdigest()


def _replace(target: Path, data: bytes, *, like: Path) -> None:
    """Write `target` whole or not at all, with mode and owner of `like`, else of a new file that all may read."""
    try:
        model = like.stat()
        mode, owner = model.st_mode & 0o7777, (model.st_uid, model.st_gid)
    except FileNotFoundError:
        mode, owner = 0o644, (-1, -1)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        try:
            os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(f"{error.filename or path}: {error.strerror}", hint="run as root") from error
    except OSError as error:
        import errno  # noqa: PLC0415 - only when something failed

        kind: type[FloeError] = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
        raise kind(f"{error.filename or path}: {error.strerror}", hint="see whether its disk can be written") from error
