"""What Floe wants of containerd's configuration, as changes of single keys. Pure.

Where the keys stand depends on the version of the file (`version = 2` or `3`), and which there are on containerd's own:
1.x unpacks in CRI, 2.x pulls through the transfer service, and a runtime has a snapshotter of its own from 1.7 on.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.containerd.version import Version
from floe.store.errors import UnsupportedError

NAME = "floe"
PROXY = ("proxy_plugins", NAME)
CRI = ("plugins", "io.containerd.grpc.v1.cri")
IMAGES = ("plugins", "io.containerd.cri.v1.images")
RUNTIME = ("plugins", "io.containerd.cri.v1.runtime")
UNPACK = ("plugins", "io.containerd.transfer.v1.local", "unpack_config")
# The names by which CRI is switched off.
CRI_PLUGINS = ("cri", CRI[1], IMAGES[1], RUNTIME[1])
_RUNC = "io.containerd.runc.v2"
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Set:
    """The key at `path` shall be `value`: a text, a boolean, or a list of texts."""

    path: Keys
    value: Any


@dataclass(frozen=True)
class Append:
    """The array of tables at `path` shall hold `value`."""

    path: Keys
    value: dict[str, str]


Change = Set | Append


@dataclass(frozen=True)
class Request:
    """What is asked for. `runtime`: that runtime handler alone; None: all pods. `address`, `root`: the snapshotter's."""

    version: Version
    address: Path
    root: Path
    runtime: str | None
    machine: str = ""  # as uname says; empty: this one

    @property
    def platform(self) -> str:
        """As OCI writes it. UnsupportedError for a machine that Floe has no name for."""
        machine = self.machine or platform.machine()
        if machine not in _ARCHITECTURES:
            raise UnsupportedError(f"Floe does not know how containerd calls the processor {machine}")
        return f"linux/{_ARCHITECTURES[machine]}"


def changes(request: Request, config_version: int, before: Mapping[str, Any]) -> list[Change]:
    """All of it, for a file of `config_version` that stands for `before`, its imports included."""
    found: list[Change] = [Set((*PROXY, "type"), "snapshot"), Set((*PROXY, "address"), str(request.address))]
    if request.version.is_2:
        found.append(Set((*PROXY, "capabilities"), ["remap-ids"]))
    found.append(Set((*PROXY, "exports", "root"), str(request.root)))
    of_images = IMAGES if config_version == 3 else (*CRI, "containerd")
    if request.runtime is None:
        found.append(Set((*of_images, "snapshotter"), NAME))
        if request.version.is_2 and config_version == 2:
            found += _some_runtime(before)
    else:
        found += _runtime(request, config_version, before, request.runtime)
    if not request.version.is_2 and request.runtime is None:
        found.append(Set((*of_images, "disable_snapshot_annotations"), False))
    found.append(Set((*of_images, "discard_unpacked_layers"), False))
    if request.version.is_2:
        found += _unpacking(request, before, of_images)
    return found


def _some_runtime(before: Mapping[str, Any]) -> list[Change]:
    """2.x carries the snapshotter of a file of version 2 over only when the file has a table of runtimes: seen with 2.1.9."""
    containerd = lookup(before, (*CRI, "containerd")) or {}
    if containerd.get("runtimes"):
        return []
    default = containerd.get("default_runtime_name") or "runc"
    return [Set((*CRI, "containerd", "runtimes", default, "runtime_type"), _RUNC)]


def _runtime(request: Request, config_version: int, before: Mapping[str, Any], name: str) -> list[Change]:
    """A runtime like the default one, but for its snapshotter."""
    place = (*(CRI if config_version == 2 else RUNTIME), "containerd")
    containerd = lookup(before, place) or {}
    runtimes = containerd.get("runtimes") or {}
    default = containerd.get("default_runtime_name") or "runc"
    found: list[Change] = []
    if default not in runtimes:  # with any table of runtimes containerd 1.x forgets its built-in one
        found.append(Set((*place, "runtimes", default, "runtime_type"), _RUNC))
    if name not in runtimes:
        base = {"runtime_type": _RUNC, **runtimes.get(default, {})}
        for key, value in leaves({key: value for key, value in base.items() if key != "snapshotter"}):
            found.append(Set((*place, "runtimes", name, *key), value))
    found.append(Set((*place, "runtimes", name, "snapshotter"), NAME))
    if request.version.is_2:
        found.append(Set((*IMAGES, "runtime_platforms", name, "platform"), request.platform))
        found.append(Set((*IMAGES, "runtime_platforms", name, "snapshotter"), NAME))
    return found


def _unpacking(request: Request, before: Mapping[str, Any], of_images: Keys) -> list[Change]:
    """Entries of the transfer service, which unpacks for nothing else; with any entry it forgets its built-in one."""
    found: list[Change] = []
    here = lookup(before, UNPACK) or []
    if request.runtime is not None and not here:
        other = (lookup(before, of_images) or {}).get("snapshotter") or "overlayfs"
        if other != NAME:
            found.append(Append(UNPACK, {"platform": request.platform, "snapshotter": other}))
    found.append(Append(UNPACK, {"platform": request.platform, "snapshotter": NAME}))
    return found


def missing(wanted: list[Change], config: Mapping[str, Any]) -> list[Change]:
    """What of `wanted` a configuration does not say."""
    return [change for change in wanted if not holds(change, config)]


def holds(change: Change, config: Mapping[str, Any]) -> bool:
    """Whether `config` says what the change wants."""
    found = lookup(config, change.path)
    if isinstance(change, Set):
        return type(found) is type(change.value) and bool(found == change.value)
    return isinstance(found, list) and any(_covers(entry, change.value) for entry in found)


def _covers(entry: Any, value: dict[str, str]) -> bool:
    return isinstance(entry, dict) and all(entry.get(key) == text for key, text in value.items())


def lookup(config: Mapping[str, Any], path: Keys) -> Any:
    """What stands at `path`, or None."""
    found: Any = config
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def leaves(table: Mapping[str, Any], above: Keys = ()) -> list[tuple[Keys, Any]]:
    """Every key that is no table, with its path."""
    found: list[tuple[Keys, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found += leaves(value, (*above, key))
        elif not isinstance(value, Mapping):
            found.append(((*above, key), value))
    return found
