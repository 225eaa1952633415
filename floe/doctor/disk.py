"""The disk below the node cache: what it is, and how fast beside the store."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from floe.doctor.daemons import mount_of
from floe.doctor.finding import OK, SKIPPED, WARNING, Finding, Node
from floe.selfbench import disk as measuring
from floe.selfbench.store import find_objects, forget
from floe.store import layout
from floe.store.errors import FloeError
from floe.store.objects import open_store
from floe.store.objects.file import FileStore

_NETWORK_FS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p", "virtiofs", "lustre"}
_MEMORY_FS = {"tmpfs", "ramfs"}
# What clouds call the disks that are not in the machine: model, or model and vendor, as sysfs has them.
_NETWORK_DISKS = {
    "nvme_card-pd": "Google Persistent Disk or Hyperdisk",
    "persistentdisk": "Google Persistent Disk",
    "amazon elastic block store": "Amazon EBS",
    "virtual disk": "an Azure managed disk",
    "msft nvme accelerator": "an Azure managed disk",
}
_SIZE, _SECONDS = 64 << 20, 1.0  # of the measurement, at most
_LEFT = 600.0  # seconds; what is so old nobody measures in any more
_LOCAL = "mount a local SSD and set cache_dir to a directory on it"


@dataclass(frozen=True)
class Disk:
    """`fstype` of the mount; `name` of the disk, `model`, empty where the kernel names none; `network`: what it is then."""

    fstype: str
    name: str = ""
    model: str = ""
    network: str = ""
    rotational: bool = False
    boot: bool = False


def look(path: Path, sysfs: Path = Path("/sys")) -> Disk:
    """What the directory lies on."""
    mount = mount_of(path)
    if mount is None:
        return Disk("unknown")
    base = mount.fstype.partition(".")[0]
    if mount.fstype in _NETWORK_FS or base == "fuse":
        return Disk(mount.fstype, network=f"{mount.fstype} from {mount.source}")
    root = mount_of(Path("/"))
    number = _number_of(mount.device, mount.source)
    device = sysfs / "dev/block" / number
    if not device.exists():
        return Disk(mount.fstype)
    real = Path(os.path.realpath(device))
    whole = real.parent if (real / "partition").exists() else real
    model = " ".join(_text(whole / "device" / name) for name in ("vendor", "model")).strip()
    network = next((what for sign, what in _NETWORK_DISKS.items() if sign in model.lower()), "")
    fabric = _text(whole / "device/transport") if whole.name.startswith("nvme") else ""
    if not network and fabric not in ("", "pcie"):
        network = f"NVMe over {fabric}"
    return Disk(
        mount.fstype,
        whole.name,
        model,
        network,
        # Of a virtual machine's disk the kernel says so whatever lies below.
        rotational=_text(whole / "queue/rotational") == "1" and not whole.name.startswith("vd"),
        boot=root is not None and root.device == mount.device,
    )


def kind(node: Node, sysfs: Path = Path("/sys")) -> Iterator[Finding]:
    """Local or not, and what is free."""
    for folder in node.cache_dirs:
        yield from _kind(node, folder, sysfs)


def _kind(node: Node, folder: Path, sysfs: Path) -> Iterator[Finding]:
    place = _existing(folder)
    found = look(place, sysfs)
    where = f"{folder} lies on {found.fstype}" + (f" of {found.name}" if found.name else "")
    if found.model:
        where += f" ({found.model})"
    which = ", the network boot disk" if found.boot else ", a disk over the network"
    if found.network:
        yield Finding(
            "cache disk", WARNING, f"{where}: {found.network}{which}; its reads and writes share the network", _LOCAL
        )
    elif found.fstype in _MEMORY_FS:
        yield Finding("cache disk", WARNING, f"{where}: the cache takes memory, and is gone after a reboot", _LOCAL)
    elif found.fstype == "overlay":
        yield Finding("cache disk", WARNING, f"{where}: EROFS refuses files on it, so loop devices are needed", _LOCAL)
    elif found.rotational:
        yield Finding("cache disk", WARNING, f"{where}: the kernel says that it turns", _LOCAL)
    else:
        yield Finding("cache disk", OK, where)
    space = shutil.disk_usage(place)
    reserve = node.min_free(space.total)
    if space.free <= reserve:
        text = f"{folder} has {space.free >> 20} MiB free, and cache_min_free leaves {reserve >> 20} MiB to others"
        yield Finding(
            "cache space", WARNING, f"{text}: nothing more is kept", "free space on it, or lower cache_min_free"
        )
    else:
        yield Finding("cache space", OK, f"{(space.free - reserve) >> 20} MiB more can be kept")


def speed(node: Node) -> Iterator[Finding]:
    """The cache disk's writes beside the store's reads: what cannot be written as fast as it comes is not kept."""
    check = "cache disk speed"
    if not node.may_write:
        yield Finding(
            check, SKIPPED, "measuring it writes 64 MiB to the cache disk: give --probe-writes, or see floe bench"
        )
        return
    origin, device = _origin(node)
    for folder in node.cache_dirs:
        yield _speed(check, folder, origin, device)


def _speed(check: str, folder: Path, origin: float | None, device: int | None) -> Finding:
    """`origin`: what one connection to the store reads, in bytes a second; `device`: the disk of a store in a folder."""
    if not folder.is_dir():
        return Finding(check, SKIPPED, f"there is no {folder}")
    _remove_left(folder)
    disk = measuring.measure_nameless(folder, _SIZE, _SECONDS).write_bytes_per_second
    said = f"the disk of {folder} writes {disk / 1e6:.0f} MB/s"
    if origin is None:
        return Finding(check, OK, f"{said}; the store has nothing to read that would compare")
    if folder.stat().st_dev == device:
        return Finding(check, OK, f"{said}; the store lies on the same disk: its speed is not compared")
    if disk < origin:
        text = (
            f"{said}, and one connection to the store reads {origin / 1e6:.0f} MB/s: not all that is read will be kept"
        )
        return Finding(check, WARNING, text, _LOCAL)
    return Finding(check, OK, f"{said}, one connection to the store reads {origin / 1e6:.0f} MB/s")


def _remove_left(folder: Path) -> None:
    """Directories that doctors of before left when they were killed."""
    for left in folder.glob("doctor-????????"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LEFT and not left.is_symlink():
                shutil.rmtree(left)


def _origin(node: Node) -> tuple[float | None, int | None]:
    """Bytes a second of one GET after another, of the largest packs; None without any of a MiB, or any answer.

    And the device number of a store in a folder.
    """
    device = None
    with suppress(FloeError), closing(open_store(node.store, retry=False)) as store:
        if isinstance(store, FileStore):
            with suppress(OSError):
                device = store.root.stat().st_dev
        packs = [one for one in find_objects(store, layout.PACKS, 1 << 30, looked_at=200) if one.size >= 1 << 20]
        if not packs:
            return None, device
        until, read, spent, number = time.monotonic() + _SECONDS, 0, 0.0, 0
        while not read or time.monotonic() < until:
            source = packs[number % len(packs)]
            forget(store, [source])
            begun = time.perf_counter()
            read += len(store.get(source.key, 0, min(source.size, 8 << 20)))
            spent += time.perf_counter() - begun
            number += 1
        return read / spent, device
    return None, device  # the check of the store says why


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _number_of(device: tuple[int, int], source: str) -> str:
    """`major:minor` of the disk: btrfs and others mount under a number of their own, and name the disk as source."""
    if device[0] == 0 and source.startswith("/dev/"):
        try:
            number = Path(source).stat().st_rdev
        except OSError:
            return f"{device[0]}:{device[1]}"
        return f"{os.major(number)}:{os.minor(number)}"
    return f"{device[0]}:{device[1]}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
