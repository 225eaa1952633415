"""A machine as decisions are made about it: plain values, from `lsblk --json`, a mount table and kubelet's configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LABEL = "floe-cache-"  # of our file systems; a number follows. ext4 has room for 16 bytes
_LABEL = re.compile(re.escape(LABEL) + r"\d+")
MOUNTS = "/mnt/floe-cache-"
ARRAY_NAME = "floe"  # of our array; mdadm puts a host's name and a colon before it
# What clouds call disks that are not in the machine, and such as are: model, or vendor and model, in small letters, as
# sysfs has them. floe/doctor/disk.py knows the same; this runs before that is installed.
NETWORK = {
    "nvme_card-pd": "Google Persistent Disk or Hyperdisk",
    "persistentdisk": "Google Persistent Disk",
    "amazon elastic block store": "Amazon EBS",
    "virtual disk": "an Azure managed disk",
    "msft nvme accelerator": "an Azure managed disk",
}
_LOCAL_SCSI = ("ephemeraldisk",)  # Google's local SSD behind SCSI
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Disk:
    """A block device. `kind`: lsblk's TYPE; `number`: major:minor; `above`: partitions, arrays and the like on it.

    `transport`: nvme for an NVMe disk on the machine's own PCIe, for another one tcp, rdma, fc, or nothing where it cannot be told;
    `fstype`: of a signature on it, empty for none; `empty`: no signature, and zeros wherever it was looked at;
    `held`: nothing is mounted or built on it here, but somebody has it for himself, in another mount namespace for example;
    `identity`: serial number or the like, and size: what tells it from another disk of the same name, if not from all.
    """

    path: str
    kind: str
    number: str
    size: int
    read_only: bool = False
    model: str = ""
    transport: str = ""
    fstype: str = ""
    label: str = ""
    mountpoints: tuple[str, ...] = ()
    above: tuple[Disk, ...] = ()
    empty: bool = False
    held: bool = False
    identity: str = ""

    @property
    def network(self) -> str:
        """What the disk is, when it is not in the machine."""
        model = next((what for sign, what in NETWORK.items() if sign in self.model.lower()), "")
        fabric = self.kind == "disk" and self.path.startswith("/dev/nvme") and self.transport != "nvme"
        return model or (f"NVMe over {self.transport or 'who knows what'}" if fabric else "")

    @property
    def local_flash(self) -> bool:
        """Whether it is an NVMe disk of this machine, or what a cloud calls one."""
        scsi = any(sign in self.model.lower() for sign in _LOCAL_SCSI)
        return self.kind == "disk" and (self.transport == "nvme" or scsi) and not self.network

    @property
    def ours(self) -> bool:
        """Whether Floe formatted it."""
        return self.fstype == "ext4" and _LABEL.fullmatch(self.label) is not None

    @property
    def half_done(self) -> bool:
        """Whether it can be what a formatting that was begun has left, and is nothing that others have put there since."""
        member = self.fstype == "linux_raid_member" and self.label.rpartition(":")[2] == ARRAY_NAME
        return not self.fstype or self.ours or member

    def tree(self) -> Iterator[Disk]:
        """It, and all that lies on it."""
        yield self
        for disk in self.above:
            yield from disk.tree()


@dataclass(frozen=True)
class Mount:
    """`number`: major:minor of the file system; `root`: which part of it is mounted; `target`: where."""

    number: str
    root: str
    target: str
    fstype: str


@dataclass(frozen=True)
class Kubelet:
    """`config`: its configuration file's text; `arguments`: its command line. Both empty where they are not known."""

    config: str = ""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """What decisions are made from. `kubelet`: None where there is none; `being_formatted`: identities of disks whose
    formatting was begun by an earlier run since the last boot, and may not have ended."""

    disks: tuple[Disk, ...] = ()
    mounts: tuple[Mount, ...] = ()
    kubelet: Kubelet | None = None
    being_formatted: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def mount_of(self, path: str) -> Mount | None:
        """The mount that a path lies on; of several at one place the last."""
        found = None
        for mount in self.mounts:
            inside = path == mount.target or path.startswith(mount.target.rstrip("/") + "/")
            if inside and (found is None or len(mount.target) >= len(found.target)):
                found = mount
        return found

    def below(self, number: str) -> list[Disk]:
        """The whole disks that hold the file system `number`."""
        return [disk for disk in self.disks if any(one.number == number for one in disk.tree())]

    def disk(self, path: str) -> Disk | None:
        """The device at `path`, whole or on another; by any of its names."""
        real = self.aliases.get(path, path)
        return next((one for disk in self.disks for one in disk.tree() if one.path == real), None)


def disks_from_lsblk(
    listed: Mapping[str, Any],
    signatures: Mapping[str, tuple[str, str]],
    empty: Mapping[str, bool],
    held: Collection[str] = (),
) -> tuple[Disk, ...]:
    """`lsblk --json --bytes`; `signatures`: type and label by path, from blkid; `empty`: by path, what was read as zeros."""
    return tuple(_disk(entry, signatures, empty, held) for entry in listed.get("blockdevices", ()))


def _disk(
    entry: Mapping[str, Any],
    signatures: Mapping[str, tuple[str, str]],
    empty: Mapping[str, bool],
    held: Collection[str],
) -> Disk:
    path = str(entry["path"])
    known = (entry.get("fstype") or "", entry.get("label") or "")
    table = f"{entry['pttype']} partition table" if entry.get("pttype") else ""
    fstype, label = signatures.get(path) or known
    size = int(entry.get("size") or 0)
    model = " ".join(str(entry.get(key) or "").strip() for key in ("vendor", "model")).strip()
    # Google's local SSDs may share a serial number, so the name of the NVMe namespace counts first. A partition has the WWN
    # of its disk.
    names = ("partuuid",) if entry.get("type") == "part" else ("wwid", "serial", "wwn")
    name = next((text for key in names if (text := str(entry.get(key) or "").strip())), path)
    return Disk(
        path=path,
        kind=str(entry.get("type") or ""),
        number=str(entry.get("maj:min") or ""),
        size=size,
        read_only=bool(entry.get("ro")),
        model=model,
        transport=str(entry.get("tran") or ""),
        fstype=fstype or table,
        label=label,
        mountpoints=tuple(point for point in entry.get("mountpoints") or () if point),
        above=tuple(_disk(child, signatures, empty, held) for child in entry.get("children") or ()),
        empty=not fstype and not table and empty.get(path, False),
        held=path in held,
        identity=f"{name}/{size}",
    )


def mounts_from(mountinfo: str) -> tuple[Mount, ...]:
    """The lines of /proc/self/mountinfo; proc(5) says what is in them."""
    found = []
    for line in mountinfo.split("\n"):
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) >= 5 and right:
            found.append(Mount(fields[2], _plain(fields[3]), _plain(fields[4]), right.split(" ")[0]))
    return tuple(found)


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
