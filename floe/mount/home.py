"""The folder of tree mounts, as a private mount of itself: what is mounted below does not spread to other namespaces."""

from __future__ import annotations

import errno

from floe.mount.mountinfo import mount_at, read_mounts
from floe.mount.refusals import refusal
from floe.mount.runner import MountRunner, OperationError
from floe.mount.state import RunState


class TreesHome:
    """`<run dir>/trees`. `wait` in seconds is for its lock. Thread-safe."""

    def __init__(self, runner: MountRunner, state: RunState, wait: float) -> None:
        self._runner = runner
        self._state = state
        self._wait = wait
        self._path = str(state.trees)

    def ensure(self) -> None:
        """Have it private. AccessDeniedError, DeadlineError."""
        if self._ready():
            return
        with self._state.lock("trees", self._wait):
            if self._ready():
                return
            mounted = mount_at(self._path, read_mounts()) is not None
            try:
                self._runner.run("private", target=self._path, mounted=mounted)
            except OperationError as error:
                raise refusal(error, f"{self._path} cannot be made a private mount") from error

    def remove(self) -> None:
        """Unmount it, unless a tree is mounted below; the next `ensure` makes it again."""
        with self._state.lock("trees", self._wait):
            mounts = read_mounts()
            if mount_at(self._path, mounts) is None or any(m.target.startswith(f"{self._path}/") for m in mounts):
                return
            try:
                self._runner.run("umount", target=self._path)
            except OperationError as error:
                if error.errno != errno.EBUSY:  # somebody mounts a tree just now
                    raise refusal(error, f"{self._path} cannot be unmounted") from error

    def _ready(self) -> bool:
        mount = mount_at(self._path, read_mounts())
        return mount is not None and not mount.shared
