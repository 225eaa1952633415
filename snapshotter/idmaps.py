"""Lower directories as a user namespace sees them: idmapped clones of lazy trees and layers.

containerd 2 can idmap lower directories itself, by the options `uidmap=` and `gidmap=`; but from 2.1.5 to 2.2 (and in
2.0.7) it clones their common parent without the mounts below it, and a lazy layer is such a mount: the container would
find it empty. So above lazy layers Floe makes the clones, which works with every version, and leaves the options out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from floe.mount.syscalls import MountSyscallError, attach, cloned, set_attributes, unmount
from floe.store import mounttable
from floe.store.errors import BusyError, UnavailableError

# include/uapi/linux/mount.h
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_IDMAP = 0x1, 0x100000


def clone_lower(lower: Sequence[Path], folder: Path, uid_map: str, gid_map: str) -> list[Path]:
    """Clones of the directories `lower` below `folder`, mapped; those that are mounted already stay.

    Maps are containerd's "container:host:length[,...]". UnavailableError when the kernel refuses.
    """
    targets = [folder / str(number) for number in range(len(lower))]
    mounted = {mount.target for mount in mounttable.mounts()}
    base = folder.parent.resolve() / folder.name
    missing = [
        (source, target)
        for source, target in zip(lower, targets, strict=True)
        if str(base / target.name) not in mounted
    ]
    if missing:
        try:
            with _user_namespace(uid_map, gid_map) as userns:
                for source, target in missing:
                    target.mkdir(mode=0o700, parents=True, exist_ok=True)
                    with cloned(str(source)) as mount:
                        set_attributes(mount, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_IDMAP, private=True, userns=userns)
                        attach(mount, str(target))
        except (OSError, MountSyscallError) as error:
            raise UnavailableError(
                f"layers cannot be shown to a user namespace at {folder}: {error}",
                hint="idmapped EROFS and overlay mounts need Linux 5.19 or newer",
            ) from error
    return targets


def drop_clones(folder: Path) -> None:
    """Unmount every clone below `folder`; BusyError while one is in use."""
    base = folder.parent.resolve() / folder.name
    for mount in reversed(mounttable.mounts()):
        if Path(mount.target).parent == base:
            try:
                unmount(mount.target)
            except MountSyscallError as error:
                raise BusyError(f"{mount.target} cannot be unmounted: {error}") from error


@contextmanager
def _user_namespace(uid_map: str, gid_map: str) -> Iterator[int]:
    """A descriptor of a new user namespace with these maps; it lives as long as somebody holds it."""
    script = "echo ready; read -r end"
    with subprocess.Popen(
        ["unshare", "--user", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise UnavailableError(
                    "no user namespace can be made", hint="see user.max_user_namespaces in sysctl(8)"
                )
            for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
                lines = "".join(part.replace(":", " ") + "\n" for part in text.split(","))
                Path(f"/proc/{process.pid}/{name}").write_text(lines)
            userns = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            process.kill()
    try:
        yield userns
    finally:
        os.close(userns)
