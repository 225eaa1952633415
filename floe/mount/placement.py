"""What a tree is mounted by: EROFS straight on files or on loop devices, or the portable mount.

What this kernel can do and the cache's disk allows is found out once a boot.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floe.mount.probe import Probed, probe
from floe.mount.runner import MountRunner, OperationError
from floe.mount.state import RunState
from floe.store.errors import DiskError, UnsupportedError

_log = logging.getLogger(__name__)


class Placement:
    """Mounts EROFS images, on what fits. `folders` are where images and packs lie. Thread-safe.

    `mode` and `kind`: see TreeMounter's `loop` and `kind`. The kind "auto" takes the portable mount, which `portable`
    runs, where the kernel has no EROFS.
    """

    def __init__(
        self,
        mode: str,
        runner: MountRunner,
        state: RunState,
        folders: Sequence[Path],
        *,
        kind: str = "auto",
        portable: MountRunner,
    ) -> None:
        self._mode = mode
        self._kind = kind
        self._runner = runner
        self._portable = portable
        self._warned = False
        self._state = state
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._probed: Probed | None = None

    def probe(self) -> Probed:
        """Whether files may be mounted, of all folders; asked of the kernel once a boot, then remembered in the run directory.

        A folder whose disk fails does not count, since trees may lie on the others; if it is the only one, the answer is no, until
        it can be asked. DiskError when there is no folder, OperationError ENODEV without EROFS in the kernel.
        """
        with self._lock:
            if self._probed is None:
                found, problem = self._ask_all()
                if not found and problem is None:
                    raise DiskError(f"{self._folders[0]} is not there", hint="check the cache's disk and its mount")
                if not found:
                    return Probed(False, f"that cannot be tried: {problem}")
                self._probed = next((probed for probed in found if not probed.files), found[0])
            return self._probed

    def _ask_all(self) -> tuple[list[Probed], OSError | None]:
        found: list[Probed] = []
        problem: OSError | None = None
        for folder in self._folders:
            try:
                if folder.is_dir():
                    found.append(self._recall(folder) or self._ask(folder))
            except OperationError:
                raise
            except OSError as error:
                problem = error
                _log.warning("whether trees are mounted from files in %s cannot be tried: %s", folder, error)
        return found, problem

    def mount(self, **request: Any) -> dict[str, Any]:
        """Run the operation `mount` (see helper.py). OperationError, DeadlineError, UnsupportedError."""
        if self._kind == "portable":
            return self._mount_portable(**request)
        try:
            return self._mount_erofs(**request)
        except OperationError as error:
            # Of loop devices ENODEV says something else.
            if error.errno != errno.ENODEV or not error.step.startswith("fsopen") or self._kind == "erofs":
                raise
        if not self._warned:
            self._warned = True
            _log.warning("this kernel has no EROFS: trees are mounted through pyfuse3")
        try:
            return self._mount_portable(**request)
        except OperationError as error:
            error.step = f"this kernel has no EROFS, and {error.step}"
            raise

    def _mount_portable(self, **request: Any) -> dict[str, Any]:
        return self._portable.run("mount", log=str(self._state.portable_log), **request)

    def _mount_erofs(self, **request: Any) -> dict[str, Any]:
        if self._mode == "always":
            return self._runner.run("mount", loop=True, **request)
        probed = self.probe()
        if probed.files:
            try:
                return self._runner.run("mount", **request)
            except OperationError as error:
                if error.errno != errno.ENOTBLK or self._mode == "never":
                    raise
        elif self._mode == "never":
            raise UnsupportedError(
                f"trees cannot be mounted from files: {probed.why}",
                hint='allow loop devices (loop = "auto"), or put the cache on a local disk',
            )
        return self._runner.run("mount", loop=True, **request)

    def _ask(self, folder: Path) -> Probed:
        found = probe(self._runner, folder)
        if not found.files:
            _log.warning("loop devices are put below EROFS: %s", found.why)
        self._state.write(self._file(folder), {"boot": self._state.boot, "files": found.files, "why": found.why})
        return found

    def _recall(self, folder: Path) -> Probed | None:
        try:
            found = json.loads(self._file(folder).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return Probed(found["files"], found["why"]) if found["boot"] == self._state.boot else None

    def _file(self, folder: Path) -> Path:
        return self._state.probes / f"{folder.stat().st_dev}.json"
