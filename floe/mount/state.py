"""What the mounter keeps in the run directory, readable after its death: owners, mount records, locks.

    owners/<tree>/<owner>     JSON {"owner", "boot"}: one use of a tree; the name is the owner, escaped
    mounts/<tree>.json        how the tree is mounted (`MountRecord`), written before and after the mount
    lingering/<tree>.<n>.json the same of superblocks that were unmounted here but are still used elsewhere
    stuck/<pid>.json          mount processes that the kernel does not let go (see runner.py)
    probes/<st_dev>.json      what the probe of a cache's disk found (see placement.py)
    models/<id>.json          models mounted for users (see modelmount.py)
    portable.log              messages of portable mounts
    locks/<name>.lock         flock, one for each tree; held while its mount or owners change, by any process

Every file is written under a temporary name, synced and renamed. Owners and records of another boot count for nothing.
A record without `version` is of version 1. What a newer Floe adds to one is ignored; what this one could not read without
harm has a higher version, and is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from floe.store.cache.durable import current_boot_id, sync_folder, write_durably
from floe.store.cache.node_cache import disk_errors
from floe.store.errors import BusyError, UnsupportedError

NATIVE, PACKFS, METADATA = "native", "packfs", "metadata"  # where a tree's file data come from; METADATA: it has none
VERSION = 1  # of records
_POLL = 0.01  # seconds between attempts at a lock another process holds


@dataclass(frozen=True)
class MountRecord:
    """How a tree is mounted. `device` (`major:minor`), `bdi` and `loops` are empty while the mount is being made."""

    digest: str
    mode: str  # NATIVE, PACKFS or METADATA
    packs: tuple[str, ...]
    boot: str
    device: str = ""
    bdi: str = ""  # name in /sys/class/bdi; empty when the kernel does not tell
    directio: bool = False
    loops: tuple[tuple[str, str], ...] = ()  # (loop device, its backing file)
    server: str = ""  # the process of a portable mount, as floe.store.process.identity names it
    packfs_device: str = ""  # `major:minor` of the pack filesystem below, in mode PACKFS

    @classmethod
    def parse(cls, data: dict[str, Any]) -> MountRecord:
        """The inverse of asdict() and JSON."""
        data["packs"] = tuple(data["packs"])
        data["loops"] = tuple((device, file) for device, file in data["loops"])
        return cls(**known_fields(cls, data))


def known_fields(record: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """Of a record's content, what this version of the dataclass `record` knows."""
    names = {field.name for field in fields(record)}
    return {name: value for name, value in data.items() if name in names}


class RunState:
    """Files of the mounter below `run_dir`. Thread-safe; across processes too, where the caller holds the lock."""

    def __init__(self, run_dir: Path) -> None:
        self.boot = current_boot_id()
        self.trees = run_dir / "trees"
        self.models = run_dir / "models"
        self._owners = run_dir / "owners"
        self._mounts = run_dir / "mounts"
        self._lingering = run_dir / "lingering"
        self._locks = run_dir / "locks"
        self._spare = run_dir / "spare"
        self.stuck = run_dir / "stuck"
        self.probes = run_dir / "probes"
        self.portable_log = run_dir / "portable.log"
        folders = (
            self.probes,
            self.stuck,
            self.trees,
            self.models,
            self._owners,
            self._mounts,
            self._lingering,
            self._locks,
            self._spare,
        )
        with disk_errors(f"run directory {run_dir}"):
            for folder in folders:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def lock(self, name: str, wait: float) -> Iterator[None]:
        """Hold the lock `name` against threads and processes; BusyError after `wait` seconds."""
        until = time.monotonic() + wait
        # Not inherited by mount processes, one of which may be stuck for ever.
        fd = os.open(self._locks / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise BusyError(
                            f"{name} is being mounted or unmounted by another process for over {wait:g} s",
                            hint="try again; `floe status` lists mount processes that hang",
                        ) from None
                    time.sleep(_POLL)
            yield
        finally:
            os.close(fd)

    # owners

    def add_owner(self, digest: str, owner: str) -> bool:
        """Record a use, durably; False when it was there already."""
        folder = self._owners / digest
        if owner in self.owners(digest):
            return False
        with disk_errors(f"{folder}"):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.write(folder / _file_name(owner), {"owner": owner, "boot": self.boot})
        sync_folder(self._owners)
        return True

    def remove_owner(self, digest: str, owner: str) -> None:
        """Forget a use, durably; one that is not there is no error."""
        folder = self._owners / digest
        if folder.is_dir():
            (folder / _file_name(owner)).unlink(missing_ok=True)
            sync_folder(folder)

    def owners(self, digest: str) -> set[str]:
        """Who uses a tree since this boot."""
        return {found["owner"] for path in (self._owners / digest).glob("*") if (found := self.read(path)) is not None}

    def owner_folders(self) -> list[Path]:
        """One for each tree that has or had owners."""
        return list(self._owners.iterdir())

    def forget_stale_owners(self, digest: str) -> None:
        """Remove the files of owners that another boot had, and the folder when nothing is left in it."""
        folder = self._owners / digest
        for path in folder.glob("*"):
            if self.read(path) is None:
                path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    # records

    def save(self, record: MountRecord) -> None:
        """Keep the record of a mount, durably."""
        self.write(self._mounts / f"{record.digest}.json", asdict(record))

    def record(self, digest: str) -> MountRecord | None:
        """The record of a tree's mount, if it was made since this boot."""
        found = self.read(self._mounts / f"{digest}.json")
        return None if found is None else MountRecord.parse(found)

    def records(self) -> list[MountRecord]:
        """Of all trees."""
        found = [self.record(path.stem) for path in self._mounts.glob("*.json")]
        return [record for record in found if record is not None]

    def forget(self, digest: str) -> None:
        """Remove the record of a tree's mount, durably."""
        (self._mounts / f"{digest}.json").unlink(missing_ok=True)
        sync_folder(self._mounts)

    def set_aside(self, record: MountRecord) -> None:
        """Make the record of a tree's mount one of a superblock that is used elsewhere."""
        self.write(self._lingering / f"{record.digest}.{record.device}.json", asdict(record))
        self.forget(record.digest)

    def lingering(self, digest: str = "*") -> list[tuple[Path, MountRecord]]:
        """Records set aside, with their files."""
        pairs = [(path, self.read(path)) for path in self._lingering.glob(f"{digest}.*.json")]
        return [(path, MountRecord.parse(found)) for path, found in pairs if found is not None]

    # files

    def write(self, path: Path, content: dict[str, Any]) -> None:
        """A JSON file, whole or not at all."""
        with disk_errors(f"{path}"):
            write_durably(path, json.dumps(content, sort_keys=True).encode(), self._spare)

    def read(self, path: Path) -> dict[str, Any] | None:
        """None when the file is not there or not ours, or was written before this boot; UnsupportedError: of a newer Floe."""
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("boot") != self.boot:
            return None
        version = found.get("version", VERSION)
        if version != VERSION:
            raise UnsupportedError(
                f"{path} has version {version}; this Floe knows version {VERSION}",
                hint="run the newer Floe that wrote it, or restart the machine: its mounts end with that",
            )
        return found


def _file_name(owner: str) -> str:
    name = quote(owner, safe="")
    if len(name) > 200 or name.startswith("."):
        return hashlib.sha256(owner.encode()).hexdigest()
    return name or "%"
