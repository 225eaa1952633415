"""What is wrong on a node, with what mends it: out of what the daemons say of themselves. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from floe.store.damage import HEALING

_EXPECTED = "not_indexed"  # an image that nobody indexed is unpacked, as it should be


class Problem(NamedTuple):
    """`level`: error or warning; `mend`: a command, or what to do."""

    level: str
    text: str
    mend: str


def problems(status: Mapping[str, Any]) -> list[Problem]:
    """The worst first; `status` as `floe status --json` shows it, or parts of it."""
    found = [*_daemons(status), *_damage(status), *_cache(status), *_trees(status), *_index(status.get("index") or {})]
    return sorted(found, key=lambda one: one.level != "error")


def _daemons(status: Mapping[str, Any]) -> Iterator[Problem]:
    packfs, snapshotter = status.get("packfs") or {}, status.get("snapshotter") or {}
    if not packfs.get("running"):
        state = packfs.get("state", "not running")
        yield Problem(
            "error", f"the pack filesystem: {state}", "systemctl start floe-packfs; journalctl -u floe-packfs"
        )
    if not snapshotter.get("running"):
        state = snapshotter.get("state", "not running")
        yield Problem("warning", f"the snapshotter: {state}", "systemctl start floe-snapshotter")
    if packfs.get("restarts"):
        text = f"{packfs['restarts']} workers of the pack filesystem ended by themselves"
        yield Problem("warning", text, "journalctl -u floe-packfs; floe debug bundle")
    if (breaker := snapshotter.get("breaker")) not in (None, "closed"):
        then = "it is left alone for a moment" if breaker == "open" else "the next one asks it again"
        yield Problem("warning", f"the store failed the snapshotter's last look-up; {then}", "floe doctor")
    for reason, count in sorted((snapshotter.get("fallbacks") or {}).items()):
        if count and reason != _EXPECTED:
            yield Problem("warning", f"{count} layers were unpacked instead: {reason}", "floe doctor; floe trace")
    for process in status.get("stuck_processes") or ():
        text = f"process {process['pid']} hangs in the kernel: {process['what']}"
        yield Problem("warning", text, "nothing: it goes with the mount that it waits for")


def _damage(status: Mapping[str, Any]) -> Iterator[Problem]:
    for pack in status.get("damaged") or ():
        whose = f", of {', '.join(pack['sources'])}" if pack["sources"] else ""
        text = f"pack {pack['pack'][:16]}{whose} is damaged in the store: {len(pack['frames'])} frames"
        yield Problem("error", text, HEALING)
    for stall in (status.get("packfs") or {}).get("stalls") or ():
        if stall["seconds"] >= 1:
            text = f"a read of {stall['path']} waited for {stall['seconds']:.1f} s: {stall['cause']}"
            yield Problem("warning", text, "floe trace")


def _cache(status: Mapping[str, Any]) -> Iterator[Problem]:
    for directory in (status.get("cache") or {}).get("directories") or ():
        path = directory["path"]
        if directory.get("disk_problem"):
            yield Problem("warning", f"cache directory {path}: {directory['disk_problem']}", "floe doctor")
        if directory.get("state", "ok") != "ok":
            text = f"cache directory {path} is {directory['state']}: {directory.get('problem', '')}".rstrip(": ")
            yield Problem("warning", text, "repair its disk, then: kill $(cat /run/floe/worker.pid)")
        if (directory.get("bypass") or {}).get("slow"):
            yield Problem("warning", f"the disk of {path} is slower than the store", "a faster disk; floe bench")


def _trees(status: Mapping[str, Any]) -> Iterator[Problem]:
    for mount in status.get("mounts") or ():
        if problem := (mount.get("residency") or {}).get("problem"):
            yield Problem("warning", f"tree {mount['tree'][:12]}: {problem}", "floe status")


def _index(index: Mapping[str, Any]) -> Iterator[Problem]:
    if index.get("state", "ok") not in ("ok", "none", "not made yet", "empty", "refilling"):
        text = f"the index is {index['state']}: {index.get('error') or index.get('reason') or ''}".rstrip(": ")
        yield Problem("warning", text, "nothing waits for it; see floe doctor")
