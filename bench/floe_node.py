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

from bench.native import run

MODEL = "bench"


class FloeNode:
    """Node `name` below `work`, using the store that `environ` names."""

    def __init__(self, work: Path, name: str, environ: Mapping[str, str]) -> None:
        self.home = work / f"floe-{name}"
        self.home.mkdir()
        self.mountpoint = self.home / "mnt"
        self.mountpoint.mkdir()
        self.cache, self.run_dir = self.home / "cache", self.home / "run"
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("FLOE_")},
            **environ,
            "FLOE_INDEX": f"sqlite:{self.home}/index.db",
            "FLOE_PROFILES": "off",  # else a second cold run would profit from the first
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
        self.floe("model", "push", source, MODEL)

    @contextmanager
    def mounted(self, *flags: str) -> Iterator[Path]:
        """The model, mounted by `floe model mount`; the folder."""
        self.floe("model", "mount", *flags, MODEL, self.mountpoint)
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
        self.floe("model", "mount", MODEL, self.mountpoint)
        return time.perf_counter() - begun

    def umount(self) -> None:
        """Undo `cold_mount`."""
        if os.path.ismount(self.mountpoint):
            self.floe("umount", self.mountpoint)

    def mode(self) -> str:
        """How the model's tree is mounted now: native or packfs."""
        done = subprocess.run(
            [sys.executable, "-m", "floe", "status", "--json"], env=self.env, capture_output=True, check=True
        )
        (mount,) = json.loads(done.stdout)["mounts"]
        return str(mount["mode"])

    def peak_memory(self, process: str) -> int:
        """Peak resident bytes of `keeper` or `worker`. Source: proc(5), VmHWM in /proc/pid/status."""
        pid = (self.run_dir / f"{process}.pid").read_text().strip()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise SystemExit(f"bench: process {pid} has no VmHWM")
