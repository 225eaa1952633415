"""`CACHE_DIR/bench`: all that a run leaves anywhere lies in it, or is named in it, so that the next run can clear up.

The folder is locked by the run that uses it. What a killed one left is mounts, a pack filesystem, files, and objects in the
store, whose keys are written down here before they are put.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from floe.store import mounttable
from floe.store.errors import AccessDeniedError, BusyError, DiskError, FloeError, NoSpaceError, NotFoundError
from floe.store.objects.base import ObjectStore

FOLDER = "bench"
_OBJECTS = "objects.json"


class Scratch:
    """The folder `root`, held by this process; `uses` makes one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = root / "run"
        self.mountpoint = root / "mnt"

    def note_objects(self, store: ObjectStore, keys: Sequence[str]) -> None:
        """Write down what is about to be put."""
        with (self.root / _OBJECTS).open("w") as file:
            json.dump({"store": store.url, "keys": list(keys)}, file)
            file.flush()
            os.fsync(file.fileno())

    def remove_objects(self, open_store: Callable[[], ObjectStore]) -> None:
        """Delete what was written down. The store's errors; BusyError when it was put into another store."""
        try:
            noted = json.loads((self.root / _OBJECTS).read_bytes())
        except FileNotFoundError:
            return
        except ValueError:  # killed while it wrote this down, before anything was put
            noted = {"store": "", "keys": []}
        if noted["keys"]:
            with contextlib.closing(open_store()) as store:
                if store.url != noted["store"]:
                    raise BusyError(
                        f"a killed floe bench left objects in {noted['store']}, not in {store.url}",
                        hint=f"run floe bench with that store once, or delete {', '.join(noted['keys'])} there "
                        f"and then {self.root / _OBJECTS}",
                    )
                for key in noted["keys"]:
                    _delete(store, key)
        (self.root / _OBJECTS).unlink()

    def remove_mounts(self, umount: Callable[[Path], None], stop_packfs: Callable[[Path], object]) -> None:
        """Unmount what is mounted below, by `umount`, and end the pack filesystem. BusyError when a mount stays."""
        with contextlib.suppress(FloeError):
            if mounttable.mounts_at(self.mountpoint):
                umount(self.mountpoint)
        if self.run_dir.is_dir():
            stop_packfs(self.run_dir)
        left = [mount.target for mount in mounttable.mounts() if mount.target.startswith(f"{self.root}/")]
        for target in reversed(left):
            with contextlib.suppress(FloeError):
                umount(Path(target))
        still = [mount.target for mount in mounttable.mounts() if mount.target.startswith(f"{self.root}/")]
        if still:
            raise BusyError(
                f"{', '.join(still)} cannot be unmounted", hint="see who uses it, unmount it, and run floe bench again"
            )

    def remove_files(self) -> None:
        """All but the folder itself; nothing may be mounted below."""
        for entry in self.root.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


@contextlib.contextmanager
def uses(cache_dir: Path, clear: Callable[[Scratch], None]) -> Iterator[Scratch]:
    """The scratch folder of `cache_dir`, cleared by `clear` of what a killed run left, and again at the end.

    BusyError: another floe bench uses it. AccessDeniedError, NoSpaceError, DiskError: it cannot be made.
    """
    root = Path(os.path.realpath(cache_dir)) / FOLDER
    try:
        fd = _hold(root)
    except BlockingIOError:
        raise BusyError(f"another floe bench runs in {root}", hint="wait for it, or give another --cache-dir") from None
    except PermissionError as error:
        raise AccessDeniedError(f"cannot write to {root}", hint="run as root, or give another --cache-dir") from error
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
        raise kind(f"cannot make {root}: {error.strerror}", hint="give another --cache-dir") from error
    try:
        scratch = Scratch(root)
        clear(scratch)
        try:
            yield scratch
        finally:
            clear(scratch)
            root.rmdir()
    finally:
        os.close(fd)


def _delete(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except AccessDeniedError as error:
        try:
            store.head(key)
        except NotFoundError:  # it was never put
            return
        raise AccessDeniedError(f"{error}; the object is left", hint="delete it, or run floe bench again") from error


def _hold(root: Path) -> int:
    """A locked descriptor of the folder, made when it is not there."""
    while True:
        root.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run has just removed it
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), root.stat()):
                    probe = root / "probe"  # whether files can be made here, before anything else happens
                    probe.touch(mode=0o600)
                    probe.unlink()
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
