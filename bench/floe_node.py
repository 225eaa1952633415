"""Floe as a subject: a node of its own with a private cache and run directory, driven by the `floe` command."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.native import run
from floe.store.cache.bitmap import Bitmap

MODEL = "bench"


class FloeNode:
    """Node `name` below `work`, using the store that `environ` names; `model` is what it pushes and mounts."""

    def __init__(self, work: Path, name: str, environ: Mapping[str, str], model: str = MODEL) -> None:
        self.model = model
        self.home = work / f"floe-{name}"
        self.home.mkdir()
        self.mountpoint = self.home / "mnt"
        self.mountpoint.mkdir()
        self.cache, self.run_dir = self.home / "cache", self.home / "run"
        self.env = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith("FLOE_") and key != "PYTHONDONTWRITEBYTECODE"
            },
            "FLOE_PROFILES": "off",  # else a second cold run would profit from the first
            **environ,
            "FLOE_INDEX": f"sqlite:{self.home}/index.db",
            "FLOE_CONFIG": str(self.home / "config.toml"),
            "FLOE_CACHE_DIR": str(self.cache),
            "FLOE_ROOT": str(self.home / "snapshotter"),
            "FLOE_RUN_DIR": str(self.run_dir),
        }
        (self.home / "config.toml").touch()

    def floe(self, *arguments: str | Path) -> None:
        """Run a `floe` command; ends the bench with its message when it fails."""
        run(sys.executable, "-m", "floe", *arguments, env=self.env)

    def push(self, source: Path) -> None:
        """Store the data as the model that all nodes mount."""
        self.floe("model", "push", source, self.model)

    @contextmanager
    def mounted(self, *flags: str) -> Iterator[Path]:
        """The model, mounted by `floe model mount`; the folder."""
        self.floe("model", "mount", *flags, self.model, self.mountpoint)
        try:
            yield self.mountpoint
        finally:
            self.floe("umount", self.mountpoint)

    def cold_mount(self) -> float:
        """Mount anew with nothing of the model on this node; seconds of the mount."""
        if os.path.ismount(self.mountpoint):
            self.floe("umount", self.mountpoint)
        for folder in (self.cache, self.run_dir):
            shutil.rmtree(folder, ignore_errors=True)
        begun = time.perf_counter()
        self.floe("model", "mount", self.model, self.mountpoint)
        return time.perf_counter() - begun

    def umount(self) -> None:
        """Undo `cold_mount`."""
        if os.path.ismount(self.mountpoint):
            self.floe("umount", self.mountpoint)

    def status(self) -> dict[str, Any]:
        """What `floe status --json` says."""
        done = subprocess.run(
            [sys.executable, "-m", "floe", "status", "--json"], env=self.env, capture_output=True, check=True
        )
        return dict(json.loads(done.stdout))

    def mode(self) -> str:
        """How the model's tree is mounted now: native or packfs."""
        (mount,) = self.status()["mounts"]
        return str(mount["mode"])

    def packs(self) -> list[str]:
        """The ids of the packs that this node has met."""
        return sorted(path.parent.name for path in self.cache.glob("packs/*/index"))

    def holds_all(self) -> bool:
        """Whether every frame of every pack it has met is written to the cache; they need not be synced yet."""
        for pack in self.packs():
            try:
                bits = Bitmap.decode((self.cache / "packs" / pack / "bitmap").read_bytes())
            except FileNotFoundError:
                return False
            if bits is None or not bits.is_full():
                return False
        return True

    def is_complete(self) -> bool:
        """Whether every pack it has met is whole in the cache and synced to the disk."""
        return all((self.cache / "packs" / pack / "complete").exists() for pack in self.packs())

    def pid(self, process: str) -> int:
        """The process id of `keeper` or `worker`."""
        return int((self.run_dir / f"{process}.pid").read_text())

    def peak_memory(self, process: str) -> int:
        """Peak resident bytes of `keeper` or `worker`."""
        return peak_memory(self.pid(process))


def peak_memory(pid: int) -> int:
    """The most bytes that a process had resident so far. Source: proc(5), VmHWM in /proc/pid/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"bench: process {pid} has no VmHWM")
