"""An object store in a folder: the embedded default.

A key is a path below the root. An object is written under a temporary name in `.tmp/`, synced, and renamed into
place; then its folder is synced, and so are the parents of folders that this process has not used before. A crash
leaves the old object or the new one, and at worst a temporary file that nobody lists and a later start removes.
Writers hold a lock on their temporary file, so that a start can tell a leftover from work in progress.

`.lock` orders writers: a conditional put holds it exclusively while it compares and renames, every other
change holds it shared for its one rename or unlink, and for making its temporary file; a sweep holds it exclusively. Names that begin with a dot are never keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from floe.store.copyrange import copy_range
from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    CancelledError,
    ConflictError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    SourceChangedError,
    StoreMissingError,
    UnavailableError,
)
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectInfo, Range
from floe.store.objects.keys import check_key, check_prefix, check_whole, range_length
from floe.store.objects.source import open_source

_log = logging.getLogger(__name__)

_TMP = ".tmp"
_LOCK = ".lock"
_COPY_STEP = 16 << 20  # bytes between two reports of progress
_ASYNC_THREADS = 16


class FileStore:
    """Objects below the folder `root`, which the first write creates (mode 0700). Threads and processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}"
        self._was_there = root.is_dir()
        self._durable: set[Path] = set()  # folders whose entry in their parent is known to be on disk
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        self._sweep()

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """See ObjectStore.get."""
        with self._open(key) as fd, self._errors(key):
            wanted = range_length(key, os.fstat(fd).st_size, start, length)
            if length is None:
                check_whole(key, wanted)
            return _read(fd, key, start, wanted)

    def open_range(self, key: str, start: int, length: int) -> Range:
        """See ObjectStore.open_range."""
        with self._open(key) as fd, self._errors(key):
            range_length(key, os.fstat(fd).st_size, start, length)
            return _FileRange(os.dup(fd), key, start, functools.partial(self._errors, key))

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """See ObjectStore.get_async; a cancelled read ends in its thread, unheard."""
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_ASYNC_THREADS, thread_name_prefix="floe-file")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.get, key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See ObjectStore.get_versioned."""
        with self._open(key) as fd, self._errors(key):
            status = os.fstat(fd)
            check_whole(key, status.st_size)
            return _read(fd, key, 0, status.st_size), _version(status)

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore.head."""
        with self._open(key) as fd, self._errors(key):
            status = os.fstat(fd)
            return _info(key, status)

    def put(self, key: str, data: Buffer) -> None:
        """See ObjectStore.put."""
        target = self._path(key)
        with self._errors(key, writing=True), self._temporary() as (fd, temporary):
            _write(fd, data)
            self._publish(fd, temporary, target)

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """See ObjectStore.put_file; shares blocks with the source where the file system can."""
        target = self._path(key)
        with open_source(path) as source, self._errors(key, writing=True), self._temporary() as (fd, temporary):
            _copy(source.fileno(), fd, path, progress)
            self._publish(fd, temporary, target)

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if."""
        target = self._path(key)
        with self._errors(key, writing=True), self._temporary() as (fd, temporary):
            _write(fd, data)
            return self._publish(fd, temporary, target, (version,))

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        target = self._path(key)
        try:
            with self._errors(key):
                target.parent.stat()  # deleting from nothing makes no folders
                with self._locked(fcntl.LOCK_SH):
                    target.unlink()
                _sync_folder(target.parent)
        except NotFoundError:
            return

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list. NotFoundError when the root itself does not exist."""
        folder = check_prefix(prefix)
        with self._errors(prefix or "the store"):
            if not self.root.is_dir():
                raise self._no_root()
        yield from self._walk(self.root / folder, f"{folder}/" if folder else "")

    def close(self) -> None:
        """See ObjectStore.close."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with self._errors(prefix), os.scandir(folder) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except NotFoundError:  # nothing there, or removed since its parent was read
            return
        for entry in found:
            key = prefix + entry.name
            if entry.is_dir():
                yield from self._walk(folder / entry.name, f"{key}/")
                continue
            try:
                with self._errors(key):
                    status = entry.stat()
            except NotFoundError:
                continue
            yield _info(key, status)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[int]:
        path = self._path(key)
        with self._errors(key):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[int, Path]]:
        """A new, locked file in `.tmp/`, gone afterwards unless it was renamed."""
        folder = self.root / _TMP
        path = folder / uuid.uuid4().hex
        self._make_folder(folder)
        try:
            fd = self._create(path)
        except FileNotFoundError:  # somebody removed the whole store after we made it
            self._durable.clear()
            self._make_folder(folder)
            fd = self._create(path)
        try:
            yield fd, path
        finally:
            with contextlib.suppress(FileNotFoundError):  # it was renamed, as it should be
                path.unlink()
            os.close(fd)

    def _create(self, path: Path) -> int:
        """A new file, locked; no sweep comes between the two."""
        with self._locked(fcntl.LOCK_SH):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def _publish(self, fd: int, temporary: Path, target: Path, only: tuple[str | None] | None = None) -> str:
        """Rename into place, durably; with `only`, if the target's version (None: absent) is the one given."""
        # The kernel's own timestamps may repeat within a tick; with these, no two contents share a version.
        now = time.time_ns()
        os.utime(fd, ns=(now, now))
        os.fsync(fd)
        self._make_folder(target.parent)
        with self._locked(fcntl.LOCK_SH if only is None else fcntl.LOCK_EX):
            if only is not None and _version_at(target) != only[0]:
                raise ConflictError(f"{target.relative_to(self.root)} in {self.url} was changed by somebody else")
            try:
                os.rename(temporary, target)  # noqa: PTH104 - the crash test counts calls into os
            except FileNotFoundError:  # somebody removed the folder after we made it
                self._durable.clear()
                self._make_folder(target.parent)
                os.rename(temporary, target)  # noqa: PTH104 - as above
        _sync_folder(target.parent)
        return _version(os.fstat(fd))

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)

    def _make_folder(self, folder: Path) -> None:
        """Make `folder`, and make it last: its entry, and those of its parents below the root, are synced."""
        if folder in self._durable:
            return
        if folder == self.root:
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            if missing and self._was_there:
                # An unmounted disk, say: what is written into its mountpoint is lost, and in the way when it comes back.
                raise UnavailableError(
                    f"the folder {self.root} of the store is gone",
                    hint="mount it again or move it back; nothing was written",
                )
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)  # images hold secrets, such as their /etc/shadow
                _sync_folder(path.parent)
        else:
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            # Even when it was there: the process that made it may not have come to the sync.
            _sync_folder(folder.parent)
        self._durable.add(folder)

    def _sweep(self) -> None:
        """Remove what crashed writers left: what is not locked, while nobody can be about to lock it."""
        try:
            with os.scandir(self.root / _TMP) as entries:
                found = [entry.path for entry in entries]
            lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CLOEXEC) if found else None
        except OSError:  # none, or not ours to clean: reading goes on without
            return
        if lock is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in found:
                _remove_leftover(path)
        except BlockingIOError:  # a writer is at it; the next start will see to it
            return
        finally:
            os.close(lock)

    def _no_root(self) -> StoreMissingError:
        return StoreMissingError(
            f"the store {self.url} does not exist",
            hint="push a model or index an image to create it, or check the store's address",
        )

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._translate(error, key, writing=writing) from error

    def _translate(self, error: OSError, key: str, *, writing: bool) -> FloeError:
        where = f"{key} in {self.url}"
        code = error.errno
        if code == errno.ENOENT or (code in (errno.ENOTDIR, errno.EISDIR) and not writing):
            with contextlib.suppress(OSError):
                if not self.root.exists():
                    return self._no_root()
            return NotFoundError(f"no object {where}")
        if code in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            return PreconditionError(
                f"cannot write {where}: a folder and an object would have the same name",
                hint=f"see whether {self.root} is a folder, or give another store address",
            )
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            verb = "write" if writing else "read"
            return AccessDeniedError(
                f"cannot {verb} {where}: {os.strerror(code)}",
                hint=f"run as the owner of {self.root}, or give this user access to it",
            )
        if code in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(f"no space left to write {where}", hint="free some disk space, then try again")
        if code == errno.ENAMETOOLONG:
            return BadInputError(
                f"cannot use {where}: the path is too long", hint="give a store address with a shorter path"
            )
        return UnavailableError(
            f"cannot use {where}: {os.strerror(code) if code else error}",
            hint="see the disk's health in the kernel's log (dmesg)",
        )


class _FileRange:
    """See Range."""

    def __init__(self, fd: int, key: str, start: int, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._errors = errors
        self._fd = fd
        self._key = key
        self._at = start
        self._aborted = False

    def readinto(self, buffer: memoryview) -> None:
        while buffer:
            if self._aborted:
                raise CancelledError(f"nobody wants {self._key} any more")
            with self._errors():
                count = os.preadv(self._fd, [buffer], self._at)
            if not count:  # shrunk under us: not something a store's writer does
                range_length(self._key, self._at, self._at, len(buffer))
            self._at += count
            buffer = buffer[count:]

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        os.close(self._fd)


def _remove_leftover(path: str) -> None:
    with contextlib.suppress(OSError):  # a living writer's, another sweeper's, or not ours
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)  # noqa: PTH108 - a string from scandir
            _log.info("removed %s, left by a writer that crashed", path)
        finally:
            os.close(fd)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, _version(status), status.st_mtime)


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _version_at(path: Path) -> str | None:
    try:
        return _version(path.stat())
    except FileNotFoundError:
        return None


def _read(fd: int, key: str, start: int, length: int) -> bytes:
    parts: list[bytes] = []
    end = start + length
    while start < end:
        part = os.pread(fd, end - start, start)
        if not part:  # shrunk under us: not something a store's writer does
            range_length(key, start, start, end - start)
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(fd: int, data: Buffer) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _copy(source: int, target: int, path: Path, progress: Callable[[int], None] | None) -> None:
    size = os.fstat(source).st_size
    done = 0
    while done < size:
        copied = copy_range(source, done, target, done, min(_COPY_STEP, size - done))
        if not copied:
            raise SourceChangedError(f"{path} shrank while it was stored: {done} of {size} bytes were there")
        done += copied
        if progress is not None:
            progress(copied)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
