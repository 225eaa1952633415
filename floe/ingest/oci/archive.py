"""A tar file of an image, read in place: its headers once, contents at their offsets. Links between members count."""

from __future__ import annotations

import contextlib
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from floe.store.errors import AccessDeniedError, DamagedError, FloeError, NoSpaceError, UnsupportedError

PIECE = 1 << 20  # bytes
SMALL = 4 << 20  # bytes; the most that is read of a member whole
_MEMBERS_MAX = 100_000
_LINKS_MAX = 8  # links to links


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


class Archive:
    """The tar file `path`, uncompressed. Thread-safe; `close` it.

    AccessDeniedError, DamagedError: no tar. UnsupportedError: a compressed one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[str, _Member] = {}
        self._links: dict[str, str] = {}
        with path_errors(path):
            self._file = path.open("rb")
        try:
            self._index()
        except BaseException:
            self._file.close()
            raise

    def _index(self) -> None:
        if self._file.read(6)[:2] == b"\x1f\x8b":
            raise UnsupportedError(f"{self._path} is compressed", hint="decompress it first, for example with gunzip")
        self._file.seek(0)
        try:
            with tarfile.open(fileobj=self._file, mode="r:", errorlevel=0) as tar:
                for member in tar:
                    name = posixpath.normpath(member.name)
                    if member.isreg() and not member.issparse():
                        self._members[name] = _Member(member.offset_data, member.size)
                    elif member.issym():
                        self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                    elif member.islnk():
                        self._links[name] = posixpath.normpath(member.linkname)
                    if len(self._members) + len(self._links) > _MEMBERS_MAX:
                        raise DamagedError(f"{self._path} has more than {_MEMBERS_MAX} members")
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise DamagedError(f"{self._path} is not a tar archive: {error}") from error

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> _Member | None:
        for _ in range(_LINKS_MAX):
            if name in self._members:
                return self._members[name]
            name = self._links.get(name, "")
        return None

    def size(self, name: str) -> int | None:
        """The bytes of member `name`; None when there is none."""
        member = self._find(name)
        return None if member is None else member.size

    def read(self, name: str) -> bytes | None:
        """Member `name`, at most its first SMALL bytes; None when there is none."""
        member = self._find(name)
        return None if member is None else b"".join(self._pieces(_Member(member.offset, min(member.size, SMALL))))

    def open(self, name: str) -> Iterator[bytes] | None:
        """Member `name` in pieces; None when there is none. DamagedError: the file ends before the member does."""
        member = self._find(name)
        return None if member is None else self._pieces(member)

    def _pieces(self, member: _Member) -> Iterator[bytes]:
        at, end = member.offset, member.offset + member.size
        while at < end:
            with path_errors(self._path):
                piece = os.pread(self._file.fileno(), min(PIECE, end - at), at)
            if not piece:
                raise DamagedError(f"{self._path} is cut short: {end - at} bytes of a blob are missing")
            at += len(piece)
            yield piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def path_errors(path: Path) -> Iterator[None]:
    """What the file system says, in Floe's terms; `path` is named when the failure names none."""
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(f"no permission for {error.filename or path}") from error
    except OSError as error:
        if error.errno == 28:
            raise NoSpaceError(f"no space left at {path}") from error
        raise FloeError(f"{error.filename or path}: {error.strerror}") from error
