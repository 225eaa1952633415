"""A model's tree written to a directory, as it was pushed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from floe.client.content import read_into
from floe.client.tree import DIRECTORY, FILE, Entry, TreePaths
from floe.fuse.reader import Reader
from floe.ingest.spool import remove_abandoned, remove_tree
from floe.store.cache.durable import sync_folder, write_all
from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    CancelledError,
    FloeError,
    NoSpaceError,
    UnavailableError,
)
from floe.store.mounttable import mounts_at
from floe.store.progress import Progress

_PIECE = 16 << 20  # bytes read and written at once, by each worker
_MARK = ".floe-export-"
_YOUNG = 10.0  # seconds; a directory so young may not be locked yet


@dataclass(frozen=True)
class Exported:
    """What was written: regular `files` (a file of several names once), and `content` bytes; `warnings`: what could not be kept."""

    directory: Path
    files: int
    content: int
    warnings: tuple[str, ...] = ()


def export_tree(
    tree: TreePaths, reader: Reader, directory: Path, *, workers: int = 2, progress: Progress | None = None
) -> Exported:
    """Write the tree to `directory`, which is new, or empty: content, names, modes, times, symlinks, hard links, `user.*`.

    Everything belongs to the caller. It is written beside the directory under another name, which is renamed when all is
    there and synced: whenever it is stopped, `directory` is whole or as it was. What a killed export to the same directory left
    beside it is removed. BadInputError: something is there, is mounted there, or it is the current directory.
    NoSpaceError, before anything is written where the disk is too small. The reader's errors.
    """
    target = directory.absolute()
    _check_target(target)
    entries = list(tree.walk())
    inodes = {entry.inode: entry.size for entry in entries if entry.kind == FILE}
    total = sum(inodes.values())
    _check_room(target.parent, total)
    if progress is not None:
        progress.total(total)
    with _failing(target):
        made, lock = _make_beside(target)
    try:
        with _failing(target):
            warnings = _write(tree, reader, made, entries, workers=workers, progress=progress)
            os.rename(made, target)  # noqa: PTH104 - over an empty directory, which Path.rename does not promise
            sync_folder(target.parent)
    except BaseException:
        remove_tree(made)
        raise
    finally:
        os.close(lock)
    return Exported(target, len(inodes), total, tuple(warnings))


def _make_beside(target: Path) -> tuple[Path, int]:
    """A new directory beside the target, and a descriptor that holds a lock on it as long as its owner lives."""
    prefix = f".{target.name[:100]}{_MARK}"
    ours = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}")  # as mkdtemp calls them
    for path in target.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if ours.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _YOUNG:
                remove_abandoned(path)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # on NFS directories cannot be locked; nobody removes them there
        fcntl.flock(lock, fcntl.LOCK_EX)
    return made, lock


def _check_target(target: Path) -> None:
    try:
        found = target.lstat()
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise BadInputError(
                f"{target.parent} is not a directory", hint="make the directory above it first"
            ) from None
        return
    except OSError as error:
        raise BadInputError(f"{target}: {error.strerror}", hint="give a new directory") from error
    if not stat.S_ISDIR(found.st_mode):
        raise BadInputError(f"{target} is there already, and no directory", hint="give a new directory")
    with _failing(target):
        if any(target.iterdir()):
            raise BadInputError(f"{target} is not empty", hint="give a new directory, or an empty one")
        why = "something is mounted at it" if mounts_at(target.resolve()) else ""
        if os.path.samestat(found, os.stat(".")):  # noqa: PTH116 - Path.cwd() asks for its name, which may be gone
            why = "it is the current directory"
    if why:
        # A rename takes its place: refused for a mount, unseen by who stands in it.
        raise BadInputError(f"{target} would be replaced, and {why}", hint="give a new directory below it")


def _check_room(parent: Path, total: int) -> None:
    with _failing(parent):
        disk = os.statvfs(parent)
    free = disk.f_bavail * disk.f_frsize
    if free < total:
        raise NoSpaceError(
            f"the model has {total} bytes, and {parent} {free} free", hint="give a directory on another disk"
        )


def _write(
    tree: TreePaths, reader: Reader, root: Path, entries: list[Entry], *, workers: int, progress: Progress | None
) -> list[str]:
    warnings: list[str] = []
    first: dict[int, Entry] = {}
    links: list[tuple[Entry, Entry]] = []
    for entry in entries:
        if entry.kind == DIRECTORY:
            (root / entry.path).mkdir(mode=0o700)
        elif entry.kind == FILE:
            if entry.inode in first:
                links.append((first[entry.inode], entry))
            else:
                first[entry.inode] = entry

    stopped = threading.Event()

    def go_on() -> None:
        if stopped.is_set():
            raise CancelledError("the export was stopped")

    def write(entry: Entry) -> None:
        inode = tree.inode(entry)
        fd = os.open(root / entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, entry.size)
            buffer = memoryview(bytearray(min(_PIECE, entry.size)))
            for offset in range(0, entry.size, _PIECE):
                go_on()
                length = min(_PIECE, entry.size - offset)
                at = 0
                for extent in tree.image.extents(inode, offset, length):
                    if extent.pack is not None:  # what is zeros stays a hole
                        part = buffer[: extent.length]
                        read_into(tree.image, reader, inode, offset + at, part)
                        write_all(fd, part, offset + at)
                    at += extent.length
                if progress is not None:
                    progress.advance(length)
            go_on()
            warnings.extend(_complete(tree, entry, fd))
        finally:
            os.close(fd)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="floe-export")
    try:
        for _ in pool.map(write, first.values()):
            pass
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    _finish(tree, root, entries, links, warnings)
    return warnings


def _finish(
    tree: TreePaths, root: Path, entries: list[Entry], links: list[tuple[Entry, Entry]], warnings: list[str]
) -> None:
    """What comes after the content: further names, symlinks, directories' attributes."""
    for one, other in links:
        (root / other.path).hardlink_to(root / one.path)
    for entry in entries:  # last: nothing is written through one
        if entry.link is not None:
            os.symlink(entry.link, root / entry.path)  # noqa: PTH211 - text, no path
            os.utime(root / entry.path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
    # What is in a directory changes its time; and one that is read-only cannot be filled.
    for entry in (*reversed([entry for entry in entries if entry.kind == DIRECTORY]), tree.find("")):
        fd = os.open(root / entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            warnings.extend(_complete(tree, entry, fd))
        finally:
            os.close(fd)


def _complete(tree: TreePaths, entry: Entry, fd: int) -> list[str]:
    """Give what is written its attributes, and have it on the disk; warnings."""
    warnings = list(_set_xattrs(tree, entry, fd))
    os.fchmod(fd, entry.mode & 0o777)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    os.fsync(fd)
    return warnings


def _set_xattrs(tree: TreePaths, entry: Entry, fd: int) -> Iterator[str]:
    for name, value in tree.image.xattrs(tree.inode(entry)).items():
        if name.startswith(b"user."):
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                yield f"{entry.path}: extended attribute {os.fsdecode(name)} is not kept: {error.strerror}"


@contextlib.contextmanager
def _failing(target: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(
            f"{target} cannot be written: {error.strerror}", hint="give another directory"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no room for {target}", hint="give a directory on another disk") from error
        kind: type[FloeError] = BadInputError if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else UnavailableError
        raise kind(f"{target} cannot be written: {error.strerror or error}", hint="give another directory") from error
