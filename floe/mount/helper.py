"""`python -m floe.mount.helper`: one mount operation, one JSON object in on stdin, one out on stdout.

A process of its own, since mount and umount may hang in the kernel, where no signal reaches them: whoever started it
stops waiting and goes on. So it imports little and decides nothing. The answer is the operation's, or
{"errno": number, "step": what failed, "log": [the kernel's own words]}.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from floe.mount.syscalls import (
    IDMAP,
    NODEV,
    NOSUID,
    RDONLY,
    FsContext,
    MountSyscallError,
    attach,
    cloned,
    new_user_namespace,
    set_attributes,
    sysfs_name,
    unmount,
)

_ATTRIBUTES = {"ro": RDONLY, "nosuid": NOSUID, "nodev": NODEV}
_BDI = "/sys/class/bdi"


def mount_tree(
    source: str,
    devices: list[str],
    target: str,
    *,
    directio: bool = False,
    loop: bool = False,
    read_ahead_kb: int = 1024,
) -> dict[str, Any]:
    """Mount an EROFS image at `target` with its devices in order, read-ahead set before anyone can see it.

    Answers {"device": "major:minor", "bdi": its name or "", "directio": whether set, "loops": [[device, file], ...]}.
    """
    with ExitStack() as stack:
        loops: list[list[str]] = []
        if loop:
            from floe.mount.loop import attach_loop  # noqa: PLC0415 - a third of this process's start, and rarely needed

            files = [source, *devices]
            for path in files:
                device = attach_loop(path, direct_io=directio)
                stack.callback(os.close, device.fd)  # once the mount holds it; when there is no mount this frees it
                loops.append([device.path, path])
            source, *devices = [path for path, _ in loops]
        made = _make(stack, source, devices, directio=directio and not loop)
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=made.fd)
        try:
            answer = {**_identify(root, made.appeared), "directio": made.directio, "loops": loops}
        finally:
            os.close(root)
        for name in [answer["bdi"]] if answer["bdi"] else made.appeared:
            _write(f"{_BDI}/{name}/read_ahead_kb", str(read_ahead_kb))
        attach(made.fd, target)
        return answer


class _Made(NamedTuple):
    """A mount that is attached nowhere; `appeared` are the names that came into /sys/class/bdi meanwhile."""

    fd: int
    directio: bool
    appeared: list[str]


def _make(stack: ExitStack, source: str, devices: list[str], *, directio: bool) -> _Made:
    context = stack.enter_context(closing(FsContext("erofs")))
    context.path("source", source)
    context.flag("ro")
    for device in devices:
        context.path("device", device)
    if directio:
        try:
            context.flag("directio")
        except MountSyscallError as error:
            if error.errno != errno.EINVAL:  # what kernels before 6.15 say
                raise
            directio = False
    before = _erofs_bdis()
    context.create()
    mount_fd = context.mount(RDONLY)
    stack.callback(os.close, mount_fd)
    return _Made(mount_fd, directio, sorted(_erofs_bdis() - before))


def _erofs_bdis() -> set[str]:
    return {name for name in os.listdir(_BDI) if name.startswith("erofs-")}  # noqa: PTH208 - pathlib takes long to import


def _write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _identify(root: int, appeared: list[str]) -> dict[str, Any]:
    """The superblock's device number, and its backing device info in /sys/class/bdi."""
    device = os.fstat(root).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    name = (sysfs_name(root) or "").rpartition("/")[2]
    if os.access(f"{_BDI}/{number}", os.F_OK):  # on a block device
        bdi = number
    elif name and os.access(f"{_BDI}/{name}", os.F_OK):
        bdi = name
    else:  # a kernel that does not tell: the one that appeared while we mounted, if it was only one
        bdi = appeared[0] if len(appeared) == 1 else ""
    return {"device": number, "bdi": bdi}


def identify(target: str) -> dict[str, Any]:
    """What `mount_tree` answers of a mount that is there already, as far as it can be told."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _identify(root, [])
    finally:
        os.close(root)


def bind(source: str, target: str, attributes: list[str]) -> dict[str, Any]:
    """Bind `source` at `target`, its flags in force before anyone can see it."""
    flags = 0
    for name in attributes:
        flags |= _ATTRIBUTES[name]
    with cloned(source) as mount_fd:
        set_attributes(mount_fd, flags)
        attach(mount_fd, target)
    return {}


def idmap(pairs: list[list[str]], stale: list[str], uid_map: str, gid_map: str) -> dict[str, Any]:
    """Show the first directory of each of `pairs` at the second, read-only, with owners mapped, private.

    Maps are lines of /proc/<pid>/uid_map. What lies at `stale` is taken away before, for whoever has it open to keep.
    """
    for target in stale:
        unmount(target, detach=True)
    userns = _user_namespace(uid_map, gid_map)
    try:
        for source, target in pairs:
            os.makedirs(target, mode=0o700, exist_ok=True)  # noqa: PTH103 - pathlib takes long to import
            with cloned(source) as mount_fd:
                set_attributes(mount_fd, RDONLY | IDMAP, private=True, userns=userns)
                attach(mount_fd, target)
    finally:
        os.close(userns)
    return {}


def _user_namespace(uid_map: str, gid_map: str) -> int:
    """A descriptor of a new user namespace with these maps; it lives as long as somebody holds it."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            new_user_namespace()
            os.write(ready[1], b"0")
            os.close(go[1])
            os.read(go[0], 1)  # until the other end is closed
        except MountSyscallError as error:
            os.write(ready[1], str(error.errno).encode())
        finally:
            os._exit(0)
    try:
        os.close(ready[1])
        answer = int(os.read(ready[0], 16) or errno.EIO)
        if answer:
            raise MountSyscallError(answer, "make a user namespace (see user.max_user_namespaces in sysctl(8))", [])
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            _write(f"/proc/{child}/{name}", text)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go[1])
        os.waitpid(child, 0)


def make_private(target: str, *, mounted: bool) -> dict[str, Any]:
    """Make `target` a private mount (of itself, if it is not `mounted`): what is mounted below stays in this namespace."""
    if not mounted:
        with cloned(target) as mount_fd:
            attach(mount_fd, target)  # below a shared mount this makes it shared, too
    fd = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        set_attributes(fd, private=True)
    finally:
        os.close(fd)
    return {}


def umount(target: str, *, detach: bool = False) -> dict[str, Any]:
    """Unmount what is on top at `target`."""
    unmount(target, detach=detach)
    return {}


def umount_all(targets: list[str]) -> dict[str, Any]:
    """Unmount what is on top at each of `targets`, in their order, up to the first that cannot be."""
    for target in targets:
        unmount(target)
    return {}


def ask(paths: list[str]) -> dict[str, Any]:
    """Whether file systems answer: {"errnos": [0 or the errno of statfs, open and readdir, ...]} in order of `paths`."""

    def one(path: str) -> int:
        try:
            os.statvfs(path)
            with os.scandir(path) as entries:
                next(entries, None)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    return {"errnos": [one(path) for path in paths]}


def waiting(minor: int) -> dict[str, Any]:
    """Requests in flight on the FUSE connection of device 0:`minor`, {"waiting": None} when it is no more.

    Read from a fusectl mount of our own, since many machines mount none.
    """
    with ExitStack() as stack:
        context = stack.enter_context(closing(FsContext("fusectl")))
        context.create()
        mount_fd = context.mount(RDONLY)
        stack.callback(os.close, mount_fd)
        try:
            file = os.open(f"{minor}/waiting", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount_fd)
        except FileNotFoundError:
            return {"waiting": None}
        stack.callback(os.close, file)
        return {"waiting": int(os.read(file, 64))}


def read_probe(source: str, devices: list[str], name: str, length: int) -> dict[str, Any]:
    """Mount without attaching and read `length` bytes of `name`: {"read": bytes read, "errno": 0 or what ended it}."""
    with ExitStack() as stack:
        made = _make(stack, source, devices, directio=False)
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=made.fd)
        stack.callback(os.close, file)
        done = 0
        try:
            while done < length:
                piece = os.pread(file, length - done, done)
                if not piece:
                    break
                done += len(piece)
        except OSError as error:
            return {"read": done, "errno": error.errno}
        return {"read": done, "errno": 0}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "mount": mount_tree,
    "identify": identify,
    "bind": bind,
    "idmap": idmap,
    "private": make_private,
    "umount": umount,
    "umount_all": umount_all,
    "ask": ask,
    "waiting": waiting,
    "probe": read_probe,
}


def main() -> int:
    """Run one operation."""
    request = json.load(sys.stdin)
    operation = OPERATIONS[request.pop("op")]
    try:
        answer = operation(**request)
    except MountSyscallError as error:
        answer = {"errno": error.errno, "step": error.step, "log": error.log}
    except OSError as error:
        answer = {"errno": error.errno or errno.EIO, "step": str(error), "log": []}
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
