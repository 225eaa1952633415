"""Exports of Bentos, unpacked: what `bentoml export` wrote (`.bento` is a tar compressed with xz), and its other formats.

Nothing is written outside of the folder, whatever the archive says: names are checked, and symlinks made last.
"""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from floe.ingest.chunker import os_failure
from floe.store.errors import DamagedError, NoSpaceError, UnsupportedError

_PIECE = 1 << 20
_ERRORS = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class _Member:
    """A `file` to copy, or a `link`, or a directory; `mode` is permission bits, `mtime` seconds."""

    path: PurePosixPath
    mode: int
    mtime: float
    file: IO[bytes] | None = None
    link: str | None = None


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
        for member in links:
            target = folder / member.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(member.link or "")
        # Deepest first: writing into a directory moves its time.
        for member in sorted(made, key=lambda member: len(member.path.parts), reverse=True):
            os.utime(folder / member.path, (member.mtime, member.mtime))
    except _ERRORS as error:
        raise DamagedError(f"{archive} cannot be unpacked: {error}", hint="export the Bento again") from error
    except FileExistsError as error:
        raise DamagedError(f"{archive} holds one name twice: {error.filename}", hint="export it again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"there is no room in {folder} to unpack {archive}", hint="give --spool-dir on a disk that has it"
            ) from error
        raise os_failure(error, os.fsencode(error.filename or folder)) from error


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
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
    with tarfile.open(archive, "r|*") as stream:
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
