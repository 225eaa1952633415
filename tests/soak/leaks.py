"""What a run must not leave: mounts, loop devices, cache files, descriptors, snapshots, processes, temporary files."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from soak.tally import Tally
from soak.world import CACHE_SIZE, MIB, World

from floe.store import layout, mounttable
from floe.store.protection import PushRecord

# Resident bytes at most.
LIMITS = {"keeper": 25 * MIB, "worker": 350 * MIB, "snapshotter": 120 * MIB}
# Descriptors that an idle daemon may have more than at its start: open packs, and connections to the store and to the index, which are
# kept for more than a minute; the worker has one for each of 32 streams, and as many of demand reads.
_MORE_DESCRIPTORS = {"keeper": 2, "worker": 120, "snapshotter": 25}
_ZOMBIE_SECONDS = 8


def daemons(world: World) -> dict[str, int]:
    """By name: the process ids of Floe's."""
    found = {"keeper": world.pid("keeper"), "worker": world.pid("worker"), "snapshotter": world.node.snapshotter.pid}
    return {name: pid for name, pid in found.items() if pid}


def descriptors(world: World) -> dict[str, int]:
    """By name: how many descriptors a daemon has."""
    found = {}
    for name, pid in daemons(world).items():
        with contextlib.suppress(OSError):
            found[name] = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    return found


class Watch:
    """Looks at memory, descriptors and zombies once a second."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._world, self._tally = world, tally
        self._zombies: Counter[int] = Counter()

    def look(self) -> None:
        pids = daemons(self._world)
        for name, pid in pids.items():
            self._tally.peak(f"{name} bytes", resident(pid))
        for name, count in descriptors(self._world).items():
            self._tally.peak(f"{name} descriptors", count)
        ours = set(pids.values())
        dead = {pid for pid, (state, parent) in processes().items() if state == "Z" and parent in ours}
        self._zombies = Counter({pid: self._zombies[pid] + 1 for pid in dead})
        for pid, seconds in self._zombies.items():
            if seconds == _ZOMBIE_SECONDS:
                self._tally.problem(f"leak: process {pid} stays a zombie")

    def over(self) -> list[str]:
        """Who took more memory than it may."""
        return [
            f"leak: {name} took {self._tally.peaks[f'{name} bytes'] // MIB} MiB, more than {most // MIB}"
            for name, most in LIMITS.items()
            if self._tally.peaks[f"{name} bytes"] > most
        ]


def idle_leaks(world: World, before: dict[str, int]) -> list[str]:
    """What is there though nothing is used; `before`: descriptors of the daemons when they had just started."""
    home, found = world.node.home, []
    found += [f"snapshot: {name}" for name in sorted(world.snapshots.names())]
    kept = {str(world.node.run_dir / "packs"), str(world.node.run_dir / "trees")}
    found += [
        f"mount: {mount.target}"
        for mount in mounttable.mounts()
        if mount.target.startswith(f"{home}/") and mount.target not in kept
    ]
    found += [f"loop device: {name} on {file}" for name, file in loops(world.base) if file != str(world.cache_image)]
    held = sum(path.stat().st_blocks * 512 for path in world.cache.glob("packs/*/data"))
    if held > CACHE_SIZE * 1.1 + 8 * MIB:
        found.append(f"cache: {held // MIB} MiB of packs are kept, more than {CACHE_SIZE // MIB}")
    for pattern in ("tmp/*", "packs/*.left-*", "packs/*/pins/*"):
        found += [f"cache file: {path}" for path in world.cache.glob(pattern)]
    for pattern in ("owners/*/*", "mounts/*", "lingering/*", "stuck/*", "models/*", "spare/*", "trees/*"):
        found += [f"file of the run directory: {path}" for path in world.node.run_dir.glob(pattern)]
    found += [f"snapshot directory: {path}" for path in world.node.root.glob("snapshots/*")]
    found += [f"spool file: {path}" for path in (world.base / "spool").rglob("*") if path.is_file()]
    with contextlib.closing(world.seaweed.client()) as client:
        uploads = client.list_multipart_uploads(Bucket=world.bucket).get("Uploads", [])
        relied_on = _relied_on(client, world.bucket) if uploads else set()
    found += [f"unfinished upload: {upload['Key']}" for upload in uploads if upload["Key"] not in relied_on]
    for name, count in descriptors(world).items():
        if count > before.get(name, 0) + _MORE_DESCRIPTORS[name]:
            found.append(f"descriptors: {name} has {count}, at its start it had {before.get(name)}")
    return found


def _relied_on(client: Any, bucket: str) -> set[str]:
    """What pushes say they rely on: a collector believes a killed one for three days, and leaves its unfinished uploads."""
    found = set()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=layout.PUSHES).get("Contents", []):
        data = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        found.update(PushRecord.decode(data, entry["Key"]).keys)
    return found


def wait_idle(world: World, before: dict[str, int], seconds: float = 60) -> list[str]:
    """`idle_leaks` once nothing is left, or what still is after so many seconds: clean-up is not done at once."""
    end = time.monotonic() + seconds
    while (found := idle_leaks(world, before)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def loops(base: Path) -> list[tuple[str, str]]:
    """Loop devices over files below `base`: name and file."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            file = path.read_text().strip()
            if file.startswith(f"{base}/"):
                found.append((path.parents[1].name, file))
    return found


def processes() -> dict[int, tuple[str, int]]:
    """Every process's state letter and parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_text("utf-8", "replace").rpartition(")")[2].split()
            found[int(path.parent.name)] = (state, int(parent))
    return found


def resident(pid: int) -> int:
    """Bytes; 0 for who is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return 0


def left_over(base: Path, before: set[int]) -> list[str]:
    """What a machine that was taken down must not leave: mounts, loop devices, processes, those stuck in the kernel too."""
    found = [f"mount: {mount.target}" for mount in mounttable.mounts() if mount.target.startswith(f"{base}/")]
    found += [f"loop device: {name} on {file}" for name, file in loops(base)]
    for pid, (state, _) in processes().items():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid not in before and pid != os.getpid() and os.fsencode(base) in words:
                found.append(f"process in state {state}: {pid} {words[:200]!r}")
    return found
