"""The node cache as every process sees it: trees, pack indexes, pins, and which packs are complete.

Below the root:

    trees/<tree digest>.erofs     an EROFS image, checked against its name
    trees/<tree digest>.checked   the number of the rules by which that image is sound, see erofs_check.py
    packs/<pack id>/index         the pack index object, checked against its name
    packs/<pack id>/data          sparse file of the pack's content; only the writer changes it
    packs/<pack id>/bitmap        which frames are there (see bitmap.py); only the writer changes it
    packs/<pack id>/complete      every frame was verified and synced to disk: may be mounted natively
    packs/<pack id>/pins/<owner>  keeps every frame of the pack where it is
    packs/<pack id>.left-<pid>    what a writer may still change that hangs in the kernel (see ownership.py)
    tmp/                          files on their way to their place
    writer.lock                   held by the one writer

Whoever adds a pin, or takes frames or `complete` away, holds a flock on the pack's folder. So a pin that exists before
`is_complete` says yes keeps that answer true until the pin is removed: pin first, then ask, then mount.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from cachetools import LRUCache

from floe.store.cache.durable import SPARE, create_sparse, sync_folder, write_durably
from floe.store.erofs_check import RULES, check_image
from floe.store.errors import BadInputError, DamagedError, DiskError, FloeError, NoSpaceError, NotFoundError
from floe.store.ids import Buffer, check_hexdigest, hexdigest, is_hexdigest
from floe.store.packindex import PackIndex

_log = logging.getLogger(__name__)

_POLL = 0.01  # seconds between two tries to lock a pack
_NAME_MAX = 255  # bytes of a file name
_CHECKED = ".checked"  # in the place of a tree's .erofs
_REMEMBERED = 65536  # packs and trees; some 200 bytes each
FULL = (errno.ENOSPC, errno.EDQUOT)


class NodeCache:
    """The folder `root`, on a real disk (EROFS mounts neither from overlayfs nor from tmpfs), shared by many processes.

    `size` bounds the bytes of pack content kept (None: only the disk does), `min_free` the bytes of the disk left to
    others; the writer keeps to both. Indexes and trees are small and not counted. With `make` off nothing is made in
    `root`, which may not be there. Methods are thread-safe.
    """

    def __init__(self, root: Path, *, size: int | None = None, min_free: int = 0, make: bool = True) -> None:
        self.root = root
        self.roots = (root,)
        self.size = size
        self.min_free = min_free
        self.trees = root / "trees"
        self.packs = root / "packs"
        self.spare = root / SPARE
        with disk_errors(f"cache folder {root}"):
            for folder in (root, self.trees, self.packs, self.spare) if make else ():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._sizes: LRUCache[str, int] = LRUCache(_REMEMBERED)  # content sizes of packs whose index was checked
        self._checked: LRUCache[str, tuple[int, ...]] = LRUCache(_REMEMBERED)  # trees, with the file that was checked

    @property
    def members(self) -> tuple[NodeCache, ...]:
        """Itself: see CacheGroup."""
        return (self,)

    # trees

    def add_tree(self, tree_digest: str, image: Buffer) -> Path:
        """Keep an EROFS image, durably; its path.

        DamagedError when it is not what the digest names or no sound image, UnsupportedError, NoSpaceError.
        """
        check_hexdigest(tree_digest, "tree digest")
        if hexdigest(image) != tree_digest:
            raise DamagedError(f"tree {tree_digest} does not match its digest")
        check_image(image, f"tree {tree_digest}")
        path = self.trees / f"{tree_digest}.erofs"
        with disk_errors(f"tree {tree_digest} in {self.root}"):
            write_durably(path, image, self.spare)
            self._found_sound(path)
        return path

    def tree_path(self, tree_digest: str) -> Path | None:
        """The image's path; None when it is not here, or was damaged and is now gone.

        DamagedError, UnsupportedError: it is what the digest names, but no image that the kernel should see.
        """
        if not is_hexdigest(tree_digest):
            return None
        path = self.trees / f"{tree_digest}.erofs"
        with disk_errors(f"tree {tree_digest} in {self.root}"):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            with file:
                status = os.fstat(file.fileno())
                identity = (status.st_ino, status.st_size, status.st_mtime_ns)
                with self._lock:
                    if self._checked.get(tree_digest) == identity:
                        return path
                image = file.read()
                if hexdigest(image) == tree_digest:
                    if not _is_sound(path):  # kept by an earlier version
                        check_image(image, f"tree {tree_digest}")
                        self._found_sound(path)
                    with self._lock:
                        self._checked[tree_digest] = identity
                    return path
            _log.warning("tree %s in the cache is damaged; it is fetched again", tree_digest)
            path.unlink(missing_ok=True)
        return None

    def _found_sound(self, path: Path) -> None:
        write_durably(path.with_suffix(_CHECKED), str(RULES).encode(), self.spare)

    # packs

    def pack_ids(self) -> list[str]:
        """All packs of which anything is here. OSError."""
        return [name for name in os.listdir(self.packs) if is_hexdigest(name)]  # noqa: PTH208 - names only

    def folder(self, pack_id: str) -> Path:
        """Where a pack lies, present or not. BadInputError for what is not a pack id."""
        return self.packs / check_hexdigest(pack_id, "pack id")

    def add_index(self, pack_id: str, data: Buffer) -> PackIndex:
        """Keep a pack index object, durably. DamagedError when it is not what the id names, NoSpaceError."""
        folder = self.folder(pack_id)
        index = PackIndex.decode(data, pack_id)
        with disk_errors(f"pack {pack_id} in {self.root}"):
            for place in (folder, folder / "pins"):  # not their parents: a disk may be unmounted, or its folder moved
                place.mkdir(mode=0o700, exist_ok=True)
            write_durably(folder / "index", data, self.spare)
            sync_folder(self.packs)
        with self._lock:
            self._sizes[pack_id] = index.content_size
        return index

    def index(self, pack_id: str) -> PackIndex | None:
        """The checked index; None when it is not here, or was damaged and is now gone."""
        if not is_hexdigest(pack_id):
            return None
        path = self.packs / pack_id / "index"
        with disk_errors(f"index of pack {pack_id} in {self.root}"):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        try:
            index = PackIndex.decode(data, pack_id)
        except DamagedError as error:
            _log.warning("in the cache, %s; it is fetched again", error)
            with contextlib.suppress(OSError):  # such as a disk that is read-only
                path.unlink(missing_ok=True)
            return None
        with self._lock:
            self._sizes[pack_id] = index.content_size
        return index

    def content_size(self, pack_id: str) -> int | None:
        """Bytes of a pack's content, without the network; None when its index is not here."""
        with self._lock:
            size = self._sizes.get(pack_id)
        if size is None:
            index = self.index(pack_id)
            return None if index is None else index.content_size
        return size

    def data_path(self, pack_id: str) -> Path:
        """The sparse file of a pack's content, created when absent. NotFoundError when its index is not here."""
        size = self._known_size(pack_id)
        path = self.folder(pack_id) / "data"
        with disk_errors(f"data of pack {pack_id} in {self.root}"):
            if not path.exists():
                for name in ("complete", "bitmap"):  # of data that somebody removed
                    path.with_name(name).unlink(missing_ok=True)
                create_sparse(path, size, self.spare)
        return path

    def is_complete(self, pack_id: str) -> bool:
        """Whether every byte was verified and synced, and the file has its full size."""
        folder = self.folder(pack_id)
        try:
            (folder / "complete").stat()
            return (folder / "data").stat().st_size == self.content_size(pack_id)
        except OSError:
            return False

    # pins

    def pin(self, pack_id: str, owner: str, why: str = "") -> None:
        """Keep all of a pack where it is until `owner` (any text, survives restarts) unpins it; durable, idempotent.

        `why`: for people, kept with the pin in place of what was said before. NotFoundError when the pack's index is not here.
        """
        name = _pin_name(owner)
        self._known_size(pack_id)
        with disk_errors(f"pin of pack {pack_id} in {self.root}"), self.locked(pack_id) as folder:
            pins = folder / "pins"
            pins.mkdir(mode=0o700, exist_ok=True)
            (pins / name).touch(mode=0o600)
            if why:
                (pins / name).write_text(why, encoding="utf-8")
            sync_folder(pins)
            sync_folder(folder)

    def unpin(self, pack_id: str, owner: str) -> None:
        """Take `owner`'s pin away, durably; one that is not there is no error."""
        pins = self.folder(pack_id) / "pins"
        with disk_errors(f"pin of pack {pack_id} in {self.root}"), contextlib.suppress(FileNotFoundError):
            (pins / _pin_name(owner)).unlink()
            sync_folder(pins)

    def pins(self, pack_id: str) -> set[str]:
        """Who pins this pack. OSError."""
        try:
            return {unquote(name) for name in os.listdir(self.folder(pack_id) / "pins")}  # noqa: PTH208 - names only
        except FileNotFoundError:
            return set()

    def pin_reason(self, pack_id: str, owner: str) -> str:
        """What was said when `owner` pinned a pack; empty when that was nothing, or cannot be read."""
        try:
            return (self.folder(pack_id) / "pins" / _pin_name(owner)).read_text("utf-8", "replace")
        except OSError:
            return ""

    @contextlib.contextmanager
    def locked(self, pack_id: str, *, wait: bool = True) -> Iterator[Path]:
        """Hold the pack's lock. FileNotFoundError without a folder; BlockingIOError when taken and `wait` is off."""
        folder = self.folder(pack_id)
        while True:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), folder.stat()):
                    yield folder
                    return
            except BlockingIOError:
                if not wait:
                    raise
            finally:
                os.close(fd)
            time.sleep(_POLL)  # not in flock: the folder may be left to a writer that hangs with the lock

    def _known_size(self, pack_id: str) -> int:
        size = self.content_size(pack_id)
        if size is None:
            raise NotFoundError(f"pack {pack_id} is not in the cache {self.root}", hint="fetch its tree first")
        return size


def _is_sound(path: Path) -> bool:
    try:
        return path.with_suffix(_CHECKED).read_bytes() == str(RULES).encode()
    except FileNotFoundError:
        return False


def _pin_name(owner: str) -> str:
    name = quote(owner, safe="")
    if not name or len(name) > _NAME_MAX or name in (".", ".."):
        raise BadInputError(f"{owner!r} cannot own a pin: its name must make a file name of 1 to {_NAME_MAX} bytes")
    return name


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """OSError becomes NoSpaceError or DiskError that names `what`."""
    try:
        yield
    except FloeError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise NoSpaceError(
                f"{what}: the disk is full", hint="free some space or set a smaller cache_size"
            ) from error
        raise DiskError(
            f"{what}: {error.strerror or error}", hint="check the disk, its mount and its permissions"
        ) from error
