"""Descriptions of machines as `lsblk --json` and the mount table give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bootstrap.node import Kubelet, Node, disks_from_lsblk, mounts_from

GB = 10**9
LOCAL = {"tran": "nvme", "model": "nvme_card0", "size": 375 * GB}  # Google's local SSD
_PART_NUMBERS = iter(range(1, 10**6))


def entry(path: str, kind: str = "disk", *children: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """One device as lsblk lists it."""
    found = {
        "path": path,
        "type": kind,
        "size": 100 * GB,
        "ro": False,
        "serial": f"serial of {path}" if kind == "disk" else None,
        "maj:min": f"259:{next(_PART_NUMBERS)}",
        "mountpoints": [None],
    }
    return {**found, **values, **({"children": list(children)} if children else {})}


def boot_disk(model: str = "nvme_card-pd", path: str = "/dev/nvme0n1", **values: Any) -> dict[str, Any]:
    """What / lies on: a network disk with partitions."""
    part = entry(f"{path}p1", "part", fstype="ext4", mountpoints=["/"], **{"maj:min": "259:0"})
    return entry(path, "disk", part, tran="nvme", model=model, pttype="gpt", **values)


def node(
    *entries: Mapping[str, Any],
    empty: Iterable[str] = (),
    mounts: Mapping[str, str] | None = None,
    kubelet: Kubelet | None = None,
    being_formatted: Iterable[str] = (),
) -> Node:
    """A machine. `empty`: devices that hold zeros; `mounts`: targets, with the number and root of what is mounted there."""
    table = {"/": "259:0 /", **(mounts or {})}
    text = "\n".join(
        f"{line} 0 {value.split()[0]} {value.split()[1]} {target} rw - ext4 /dev/x rw"
        for line, (target, value) in enumerate(table.items(), 20)
    )
    return Node(
        disks_from_lsblk({"blockdevices": entries}, {}, dict.fromkeys(empty, True)),
        mounts_from(text),
        kubelet,
        frozenset(being_formatted),
    )
