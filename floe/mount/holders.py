"""Who keeps a mount busy: open files, working directories and mapped files, looked up in /proc."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from floe.mount.mountinfo import MountEntry

_SECONDS = 1.0  # a look round that takes longer is cut short; the answer is for a message
_MOST = 5


def holders(mount: MountEntry) -> list[str]:
    """Processes that use files of `mount`, as `python3 (pid 123)`, at most five. Never touches the files themselves."""
    until = time.monotonic() + _SECONDS
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        if len(found) == _MOST or time.monotonic() > until:
            break
        with contextlib.suppress(OSError):  # the process ended
            if _holds(entry, mount):
                found.append(f"{(entry / 'comm').read_text().strip()} (pid {entry.name})")
    return found


def _holds(process: Path, mount: MountEntry) -> bool:
    inside = mount.target.rstrip("/") + "/"
    for name in ("cwd", "root"):
        # Links of /proc are read, not followed: the file behind may not answer.
        if (os.readlink(process / name) + "/").startswith(inside):  # noqa: PTH115 - text, no path
            return True
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor)  # noqa: PTH115 - text, no path
            if (target + "/").startswith(inside) and _mount_id(process, descriptor.name) == mount.mount_id:
                return True
    major, minor = (int(part) for part in mount.device.split(":"))
    mapped = f" {major:02x}:{minor:02x} "
    with (process / "maps").open(errors="replace") as maps:
        return any(mapped in line and inside in line for line in maps)


def _mount_id(process: Path, descriptor: str) -> int | None:
    for line in (process / "fdinfo" / descriptor).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "mnt_id":
            return int(value)
    return None


def holders_hint(mount: MountEntry) -> str:
    """A hint for BusyError."""
    found = holders(mount)
    if not found:
        return "something uses it, perhaps in another mount namespace; end that, then try again"
    return f"used by {', '.join(found)}; end them or have them close its files, then try again"
