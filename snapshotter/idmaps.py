"""Lower directories as a user namespace sees them: idmapped clones of lazy trees and layers.

containerd 2 can idmap lower directories itself, by the options `uidmap=` and `gidmap=`; but from 2.1.5 to 2.2 (and in
2.0.7) it clones their common parent without the mounts below it, and a lazy layer is such a mount: the container would
find it empty. So above lazy layers Floe makes the clones, which works with every version, and leaves the options out.

Mounts are made and taken away in a process of their own with a deadline, as all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from floe.mount.runner import MountRunner, OperationError
from floe.snapshotter.turns import Turns
from floe.store import mounttable
from floe.store.errors import BusyError, UnavailableError
from floe.store.mounttable import Mount

# Seconds for making or removing all clones of one snapshot: some milliseconds each.
DEADLINE = 10.0


class Clones:
    """The clones below a snapshot's folder. Thread-safe. `run_dir` is where processes that hang are told of."""

    def __init__(self, run_dir: Path) -> None:
        self._runner = MountRunner(DEADLINE, run_dir / "stuck")
        self._turns: Turns[Path] = Turns("the clones at")

    def have(self, lower: Sequence[Path], folder: Path, uid_map: str, gid_map: str) -> list[Path]:
        """Clones of the directories `lower` below `folder`, mapped. One of a mount that was replaced is made anew.

        Maps are containerd's "container:host:length[,...]". UnavailableError when the kernel refuses, DeadlineError.
        """
        targets = [folder / str(number) for number in range(len(lower))]
        with self._turns.take(folder, DEADLINE):
            mounts = mounttable.mounts()
            pairs, stale = [], []
            for source, target in zip(lower, targets, strict=True):
                there = _mount_at(target, mounts)
                if there is not None and there.device == _device_below(source, mounts):
                    continue
                pairs.append((str(source), str(target)))
                if there is not None:
                    stale.append(str(target))
            if pairs:
                try:
                    self._runner.run(
                        "idmap", pairs=pairs, stale=stale, uid_map=_lines(uid_map), gid_map=_lines(gid_map)
                    )
                except OperationError as error:
                    raise UnavailableError(
                        f"layers cannot be shown to a user namespace at {folder}: {error}",
                        hint="idmapped EROFS and overlay mounts need Linux 5.19 or newer; the portable mount has none",
                    ) from error
        return targets

    def drop(self, folder: Path) -> None:
        """Unmount every clone below `folder`; BusyError while one is in use, DeadlineError."""
        base = _real(folder)
        with self._turns.take(folder, DEADLINE):
            targets = [mount.target for mount in reversed(mounttable.mounts()) if Path(mount.target).parent == base]
            if targets:
                try:
                    self._runner.run("umount_all", targets=targets)
                except OperationError as error:
                    raise BusyError(f"a clone of a layer cannot be unmounted: {error}") from error


def _lines(text: str) -> str:
    """A map as the kernel takes it (user_namespaces(7))."""
    return "".join(part.replace(":", " ") + "\n" for part in text.split(","))


def _real(path: Path) -> Path:
    # The parent's real path only: a stat on a dead mount may never return.
    return path.parent.resolve() / path.name


def _mount_at(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    real = str(_real(path.parent) / path.name)
    return next((mount for mount in reversed(mounts) if mount.target == real), None)


def _device_below(path: Path, mounts: Sequence[Mount]) -> tuple[int, int] | None:
    """The device of the file system that a directory lies on."""
    real = _real(path)
    around = [mount for mount in mounts if real == Path(mount.target) or Path(mount.target) in real.parents]
    # Of several at one place the last hides the others.
    best = max(enumerate(around), key=lambda pair: (len(pair[1].target), pair[0]), default=None)
    return best[1].device if best else None
