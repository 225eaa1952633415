"""Exports of Bentos, unpacked: what `bentoml export` wrote (`.bento` is a tar compressed with xz), and its other formats.

Nothing is written outside of the folder, whatever the archive says: names are checked, symlinks made last and none through
another, and what they come to is looked at when all are there.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile, TarInfo  # type: ignore[attr-defined]
from typing import IO, Any

from floe.ingest.chunker import os_failure
from floe.store.errors import DamagedError, NoSpaceError, UnsupportedError

_PIECE = 1 << 20
_HEADER_MAX = 1 << 20  # bytes of what tells an entry's name and times; tarfile reads it at once
_CONTENT = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_COMPRESSED: dict[bytes, Callable[[Path, str], Any]] = {
    b"\xfd7zXZ\0": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}
_ZIP = (b"PK\3\4", b"PK\5\6")  # what one begins with; it may stand at the end of a tar, too, as a file's content
_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error),
    *(EOFError, RuntimeError, ValueError, OverflowError),
)


@dataclass(frozen=True)
class _Member:
    """A `file` to copy, or a `link`, or a directory; `mode` is permission bits, `mtime` seconds."""

    path: PurePosixPath
    mode: int
    mtime: float
    file: IO[bytes] | None = None
    link: str | None = None


class _Header(TarInfo):
    """One that is damaged, or not there, ends the archive with an error: tarfile takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"it is cut short or damaged: {error}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type not in _CONTENT and found.size > _HEADER_MAX:
            raise ReadError(f"{found.size} bytes of a header are too many")
        return found


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` into the empty `folder`.

    DamagedError: no archive, one that is cut short, or one with names that lead outside. UnsupportedError: hard links, devices.
    NoSpaceError: the folder's disk.
    """
    links: list[_Member] = []
    made: list[_Member] = []
    try:
        for member in _members(archive):
            if member.link is not None:
                links.append(member)
            else:
                _write(member, folder)
                made.append(member)
        _make_links(archive, links, folder)
        # Deepest first: writing into a directory moves its time.
        for member in sorted(made, key=lambda member: len(member.path.parts), reverse=True):
            os.utime(folder / member.path, (member.mtime, member.mtime))
    except FileExistsError as error:
        raise DamagedError(f"{archive} holds one name twice: {error.filename}", hint="export it again") from error
    except (*_ERRORS, OSError) as error:
        if (
            not isinstance(error, OSError) or error.errno is None
        ):  # gzip and bz2 say damage by an OSError without a number
            raise DamagedError(f"{archive} cannot be unpacked: {error}", hint="export the Bento again") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"there is no room in {folder} to unpack {archive}", hint="give --spool-dir on a disk that has it"
            ) from error
        raise os_failure(error, os.fsencode(error.filename or folder)) from error


def _make_links(archive: Path, links: list[_Member], folder: Path) -> None:
    """DamagedError: one lies below another, or leads outside by way of others."""
    paths = {member.path for member in links}
    for member in links:
        if not paths.isdisjoint(member.path.parents):
            raise DamagedError(f"{archive} holds a name below a symlink: {member.path}", hint="export the Bento again")
        target = folder / member.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(member.link or "")
    inside = os.path.realpath(folder)
    for member in links:
        if os.path.commonpath([inside, os.path.realpath(folder / member.path)]) != inside:
            raise DamagedError(
                f"{archive} holds a symlink that leads outside of it: {member.path}", hint="export the Bento again"
            )


def _members(archive: Path) -> Iterator[_Member]:
    with archive.open("rb") as file:
        begin = file.read(8)
    if begin.startswith(_ZIP):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                path = _inside(archive, info.filename)
                if stat.S_ISLNK(mode):
                    raise UnsupportedError(f"{archive} holds a symlink in a zip: {path}", hint="export it as .bento")
                if info.is_dir():
                    yield _Member(path, 0o755, 0)
                else:
                    with opened.open(info) as file:
                        yield _Member(path, mode & 0o777 or 0o644, 0, file)
        return
    opener: Callable[[Path, str], Any] = next(
        (opener for magic, opener in _COMPRESSED.items() if begin.startswith(magic)), open
    )
    with (
        opener(archive, "rb") as content,
        tarfile.open(fileobj=content, mode="r|", tarinfo=_Header) as stream,
    ):
        for item in stream:
            path = _inside(archive, item.name)
            if item.isdir():
                yield _Member(path, item.mode & 0o777 | 0o700, item.mtime)
            elif item.isreg():
                yield _Member(path, item.mode & 0o777 | 0o600, item.mtime, stream.extractfile(item))
            elif item.issym():
                _inside(archive, str(path.parent / item.linkname))
                yield _Member(path, 0o777, item.mtime, link=item.linkname)
            else:
                raise UnsupportedError(
                    f"{archive} holds {path}, which is no file, directory or symlink", hint="export the Bento again"
                )
        while content.read(_PIECE):
            pass  # to the end, where the checksums are


def _inside(archive: Path, name: str) -> PurePosixPath:
    parts: list[str] = []
    for part in name.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part == ".." or "\0" in part:
            raise DamagedError(f"{archive} holds a name that leads outside of it: {name!r}")
        elif part not in ("", "."):
            parts.append(part)
    if name.startswith("/"):
        raise DamagedError(f"{archive} holds an absolute name: {name!r}")
    return PurePosixPath(*parts)


def _write(member: _Member, folder: Path) -> None:
    path = folder / member.path
    if member.file is None:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(member.mode)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        shutil.copyfileobj(member.file, out, _PIECE)
    path.chmod(member.mode)
