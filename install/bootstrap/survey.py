"""The machine looked at: nothing is changed, and nothing is read of a disk but what tells whether it is empty."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bootstrap.errors import NodeError
from bootstrap.node import Kubelet, Node, disks_from_lsblk, mounts_from
from bootstrap.system import find, read, run

_COLUMNS = "NAME,PATH,TYPE,SIZE,RO,MODEL,VENDOR,SERIAL,WWN,TRAN,FSTYPE,LABEL,PTTYPE,PARTUUID,MOUNTPOINTS,MAJ:MIN"
_LOOKED_AT, _SAMPLES, _SAMPLE = 1 << 20, 64, 64 << 10  # the ends, and pieces between them, in bytes
# Of kubeadm, GKE, EKS and others; the running kubelet says by itself.
_KUBELET_CONFIGS = (
    "/var/lib/kubelet/config.yaml",
    "/home/kubernetes/kubelet-config.yaml",
    "/etc/kubernetes/kubelet/kubelet-config.json",
    "/etc/kubernetes/kubelet/config.json",
)
_OLDEST_KERNEL = (5, 16)
_TRIED = {"debian": ("12", "13"), "ubuntu": ("22.04", "24.04")}


def survey(devices: Iterable[str], being_formatted: Iterable[str]) -> Node:
    """The machine as decisions are made about it. `devices`: those that were named, which are looked at whatever they are;
    `being_formatted`: marks."""
    listed = json.loads(run("lsblk", "--json", "--bytes", "--output", _COLUMNS).stdout)
    aliases = {name: os.path.realpath(name) for name in devices}
    named = set(aliases.values())
    entries = [entry for entry in _flat(listed["blockdevices"]) if entry.get("path")]
    signatures, empty, held = {}, {}, set()
    boot = mark("")
    for entry in entries:
        path = entry["path"]
        entry["wwid"] = read(Path("/sys/class/block", Path(path).name, "wwid"))
        if path.startswith("/dev/nvme"):
            entry["tran"] = nvme_transport(Path("/sys/class/block", Path(path).name))
        # Others are not ours to look at: network disks may be slow, and a thousand loop devices are no disks.
        if (
            path in named
            or path.startswith("/dev/nvme")
            or "ephemeral" in str(entry.get("model")).lower()
            or entry["type"] == "raid0"
        ):
            signatures[path] = _signature(path)
            if not any(entry.get("mountpoints") or ()) and not entry.get("children"):
                if is_held(path):
                    held.add(path)
                if not signatures[path][0]:
                    empty[path] = is_empty(path)
    return Node(
        disks_from_lsblk(listed, signatures, empty, held),
        mounts_from(read(Path("/proc/self/mountinfo"))),
        _kubelet(),
        frozenset(one.removesuffix(boot) for one in being_formatted if one.endswith(boot)),
        aliases,
    )


def mark(identity: str) -> str:
    """For a disk whose formatting is begun. It counts until the next boot: by then somebody else may use the disk."""
    return f"{identity}@{read(Path('/proc/sys/kernel/random/boot_id')).strip()}"


def _flat(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield entry
        yield from _flat(entry.get("children") or ())


def nvme_transport(place: Path) -> str:
    """How an NVMe disk, at its place in sysfs, is reached: nvme when by PCIe; empty where there are several ways or none is told."""
    # `device` is the controller, or with multipath the subsystem, which has controllers in it.
    device = place / "device"
    found = {read(path).strip() for path in (device / "transport", *device.glob("nvme*/transport"))} - {""}
    only = found.pop() if len(found) == 1 else ""
    return "nvme" if only == "pcie" else only


def _signature(path: str) -> tuple[str, str]:
    """What blkid finds on a device itself, whatever udev remembers: file system, array or partition table, and label."""
    done = run("blkid", "--probe", "--output", "export", path, check=False)
    if done.returncode not in (0, 2):
        return "unknown: blkid cannot tell", ""  # several signatures at once, for example
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    table = f"{found['PTTYPE']} partition table" if "PTTYPE" in found else ""
    return found.get("TYPE", table), found.get("LABEL", "")


def is_empty(path: str) -> bool:
    """Whether a device holds zeros wherever it is looked at: both ends, and pieces in between."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        pieces = [(0, _LOOKED_AT), (max(0, size - _LOOKED_AT), _LOOKED_AT)]
        pieces += [(size // _SAMPLES * number, _SAMPLE) for number in range(1, _SAMPLES)]
        return size > 0 and all(not any(os.pread(fd, length, offset)) for offset, length in pieces)
    except OSError:
        return False
    finally:
        os.close(fd)


def is_held(path: str) -> bool:
    """Whether somebody has a device for himself: a file system, an array, or a program that asked for it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def has_raid0() -> bool:
    """Whether this kernel can make one disk of several."""
    return "[raid0]" in read(Path("/proc/mdstat")) or _can_load("raid0")


def _kubelet() -> Kubelet | None:
    arguments = _arguments_of("kubelet")
    if not arguments and not find("kubelet") and not Path("/home/kubernetes/bin/kubelet").exists():
        return None
    named = [text.partition("=")[2] for text in arguments if text.startswith("--config=")]
    named += [arguments[place + 1] for place, text in enumerate(arguments[:-1]) if text == "--config"]
    texts = (read(Path(path)) for path in (*named, *_KUBELET_CONFIGS))
    return Kubelet(next((text for text in texts if text), ""), arguments)


def _arguments_of(program: str) -> tuple[str, ...]:
    for path in glob.glob("/proc/[0-9]*/cmdline"):  # noqa: PTH207 - Path.glob fails when a process ends meanwhile
        with contextlib.suppress(OSError):
            words = Path(path).read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name == program:
                return tuple(words)
    return ()


def check_system(*, image: bool) -> list[str]:
    """What of the system itself stands in the way, as NodeError, or is worth saying. An image may run another kernel later."""
    notes = []
    release = dict(line.partition("=")[::2] for line in read(Path("/etc/os-release")).splitlines())
    name, version = (release.get(key, "").strip('"') for key in ("ID", "VERSION_ID"))
    if version not in _TRIED.get(name, ()):
        notes.append(
            f"{name or 'this system'} {version} is none that this was tried on: Debian 12, Ubuntu 22.04 and 24.04"
        )
    if find("apt-get") is None or find("systemctl") is None:
        raise NodeError("this system has no apt-get or no systemctl", "use Debian 12, Ubuntu 22.04 or 24.04")
    if not image:
        check_kernel()
    return notes


def check_kernel() -> None:
    """NodeError for one that cannot mount trees. Of a disk image's it is known at its boot."""
    kernel = platform.release()
    numbers = tuple(int(part) for part in kernel.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < _OLDEST_KERNEL:
        raise NodeError(
            f"Linux {kernel} is older than 5.16, from which on EROFS has several devices",
            "on Ubuntu 22.04: apt-get install linux-generic-hwe-22.04, then reboot; or use 24.04",
        )
    known = read(Path("/proc/filesystems")).split()
    missing = [name for name in ("erofs", "fuse", "overlay") if name not in known and not _can_load(name)]
    if missing:
        raise NodeError(
            f"this kernel has no {', '.join(missing)}", f"on Ubuntu: apt-get install linux-modules-extra-{kernel}"
        )


def _can_load(module: str) -> bool:
    """Whether there is such a module; the kernel loads it by itself when something is mounted."""
    return find("modprobe") is not None and run("modprobe", "--dry-run", module, check=False).returncode == 0
