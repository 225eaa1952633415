"""The snapshots' directories: made under a temporary name, measured, searched for a stub's marker, removed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from floe.snapshotter.lazylayers import Usage
from floe.snapshotter.mounts import Places
from floe.snapshotter.removal import remove_tree
from floe.store import mounttable
from floe.store.errors import (
    BusyError,
    CancelledError,
    DamagedError,
    FloeError,
    NoSpaceError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.stub import MARKER, MARKER_MAX, Marker

log = logging.getLogger(__name__)

TEMPORARY, ASIDE = "new-", "old-"
# A stub is a README, a marker and the directories above them; a layer with more in it is more than a stub.
_STUB_ENTRIES = 64
_STUB_FILE_MAX = 1 << 20
# Units of st_blocks (stat(2)), whatever the file system's own block size.
_BLOCK = 512


class Directories:
    """The directories under `<root>/s`. Stateless: what belongs there is the metastore's to say.

    Once `stop` is set whatever takes long ends with a CancelledError.
    """

    def __init__(self, places: Places, stop: threading.Event) -> None:
        self.places = places
        self._stop = stop
        with translated(f"root directory {places.root}"):
            places.root.mkdir(parents=True, exist_ok=True)
            # Layers hold setuid programs of every age: nobody but root reaches them here.
            places.root.chmod(0o700)
            places.snapshots.mkdir(mode=0o700, exist_ok=True)

    def new(self, *, work: bool, owner: tuple[int, int] | None) -> Path:
        """A directory with a temporary name holding `fs`, owned by `owner` (uid, gid), and `work` if wanted."""
        with translated(f"a new directory in {self.places.snapshots}"):
            made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.places.snapshots))
            try:
                (made / "fs").mkdir(mode=0o755)
                (made / "fs").chmod(0o755)
                if owner is not None:
                    os.chown(made / "fs", *owner)
                if work:
                    (made / "work").mkdir(mode=0o711)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
            return made

    def place(self, made: Path, snapshot_id: int) -> None:
        """Give a directory made by `new` its final name."""
        with translated(f"directory {made}"):
            made.rename(self.places.directory(snapshot_id))

    def mountpoint(self, path: Path) -> None:
        """Make the empty directory a tree is bound to."""
        with translated(f"mountpoint {path}"):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.mkdir(mode=0o755, exist_ok=True)

    def owner(self, path: Path) -> tuple[int, int]:
        """Who owns a layer's root: (uid, gid)."""
        with translated(f"layer {path}"):
            found = path.stat()
            return found.st_uid, found.st_gid

    def remove(self, directory: Path) -> None:
        """Delete a directory and all in it; BusyError while something is mounted below it, gone is fine.

        CancelledError when this process is told to stop: the rest is deleted another time.
        """
        with translated(f"directory {directory}"):
            for path in mounted_below(directory):
                raise BusyError(f"{path} is still mounted", hint=f"umount {path}, if no container uses it")
            remove_tree(directory, self.check)

    def check(self) -> None:
        """CancelledError when this process is told to stop."""
        if self._stop.is_set():
            raise CancelledError("the snapshotter is stopping", hint="try again when it is back")

    def strays(self, known: Iterable[int]) -> list[Path]:
        """Directories that belong to none of the ids `known`: half-made, or left by a crash."""
        names = {str(snapshot_id) for snapshot_id in known}
        with translated(f"root directory {self.places.root}"):
            found = list(self.places.snapshots.iterdir())
        return [path for path in found if path.name not in names and not path.name.startswith(ASIDE)]

    def set_aside(self, directory: Path) -> None:
        """Free the directory's name at once; deleting all in it can wait."""
        with translated(f"directory {directory}"):
            grave = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.places.snapshots))
            directory.rename(grave / directory.name)

    def set_aside_before(self) -> list[Path]:
        """What `set_aside` put away."""
        with translated(f"root directory {self.places.root}"):
            return [path for path in self.places.snapshots.iterdir() if path.name.startswith(ASIDE)]

    def usage(self, path: Path) -> Usage:
        """Disk usage of a directory: allocated bytes and inodes, each hard link once, like du(1).

        What is deleted while being counted is not counted.
        """
        blocks, inodes, linked = 0, 0, set()
        with translated(f"layer {path}"):
            waiting = [str(path)]
            blocks, inodes = path.stat().st_blocks, 1
            while waiting:
                try:
                    entries = os.scandir(waiting.pop())
                except (FileNotFoundError, NotADirectoryError):
                    continue
                with entries:
                    for entry in entries:
                        self.check()
                        try:
                            found = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if stat.S_ISDIR(found.st_mode):
                            waiting.append(entry.path)
                        elif found.st_nlink > 1:
                            if (found.st_dev, found.st_ino) in linked:
                                continue
                            linked.add((found.st_dev, found.st_ino))
                        blocks += found.st_blocks
                        inodes += 1
        return Usage(blocks * _BLOCK, inodes)

    def find_stub(self, snapshot_id: int) -> tuple[str, bool] | None:
        """The model's tree when the layer holds a marker, and whether the layer is a stub and nothing else.

        The layer is an image's content and not to be trusted: links are not followed, sizes are bounded. A marker that
        cannot be read makes the layer an ordinary one, with a warning.
        """
        upper = self.places.upper(snapshot_id)
        try:
            data = _read_inside(upper, MARKER)
            if data is None:
                return None
            marker = Marker.decode(data, f"{MARKER} in snapshot {snapshot_id}")
            return marker.tree, _is_stub_alone(upper, marker)
        except (DamagedError, UnsupportedError, OSError) as error:
            log.warning("snapshot %d holds a model marker that cannot be used: %s", snapshot_id, error)
            return None


def _read_inside(root: Path, relative: str) -> bytes | None:
    """A small regular file below `root`, without following links; None when there is none."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *parents, name = relative.split("/")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        for parent in parents:
            inner = os.open(parent, flags | os.O_DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
        # O_NONBLOCK: a fifo of that name must not block.
        file = os.open(name, flags | os.O_NONBLOCK, dir_fd=directory)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MARKER_MAX:
                return None
            return os.read(file, MARKER_MAX)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    finally:
        os.close(directory)


def _is_stub_alone(root: Path, marker: Marker) -> bool:
    """Whether nothing but the stub's own files is there: of a layer that counts as a stub, a container sees the model alone."""
    own = {f"{root}/{MARKER}", f"{root}{marker.path.rstrip('/')}/README"}
    count = 0
    for directory, folders, files in os.walk(root):
        for name in files:
            path = f"{directory}/{name}"
            found = os.lstat(path)
            if path not in own or not stat.S_ISREG(found.st_mode) or found.st_size > _STUB_FILE_MAX:
                return False
        count += 1 + len(files)
        if count > _STUB_ENTRIES or any(stat.S_ISLNK(os.lstat(f"{directory}/{name}").st_mode) for name in folders):
            return False
    return True


def mounted_below(directory: Path) -> list[Path]:
    """Mountpoints at or below `directory`, the last mounted first."""
    real = directory.resolve()
    found = [Path(mount.target) for mount in mounttable.mounts()]
    return [path for path in reversed(found) if path.is_relative_to(real)]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn an OSError about `what` into a FloeError."""
    try:
        yield
    except FloeError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{what}: {error}", hint="free space or inodes on that disk") from error
        if error.errno == errno.EBUSY:
            raise BusyError(f"{what}: {error}") from error
        raise UnavailableError(f"{what}: {error}") from error
