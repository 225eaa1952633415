"""What the same bucket gives by other ways: JuiceFS, and nothing but parallel ranged GETs into a file."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore

from bench.native import run

MIB = 1 << 20
RANGE = 8 * MIB  # bytes in one GET: what Floe asks for when it streams
CONNECTIONS = 8


class JuiceFS:
    """JuiceFS with its defaults over `redis` (URL) and the bucket at `bucket` (URL), its cache on the same disk."""

    def __init__(self, work: Path, redis: str, bucket: str, keys: tuple[str, str]) -> None:
        self.home = work / "juicefs"
        self.mountpoint, self.cache = self.home / "mnt", self.home / "cache"
        self.mountpoint.mkdir(parents=True)
        self._meta = redis
        self._program = str(Path(sys.executable).with_name("juicefs"))
        access, secret = keys
        run(
            self._program, "format", "--storage", "s3", "--bucket", bucket, "--access-key", access,
            "--secret-key", secret, "--trash-days", "0", redis, "bench",
        )  # fmt: skip

    def mount(self) -> None:
        """Mount in the background."""
        run(
            self._program, "mount", "--background", "--no-usage-report", "--cache-dir", self.cache,
            "--cache-size", "20000", "--free-space-ratio", "0.02", "--log", self.home / "log", self._meta, self.mountpoint,
        )  # fmt: skip

    def fill(self, source: Path, threads: int = 16) -> None:
        """Copy the data in, many files at once."""
        files = [path for path in source.rglob("*") if path.is_file()]
        for path in source.rglob("*"):
            if path.is_dir():
                (self.mountpoint / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda path: shutil.copyfile(path, self.mountpoint / path.relative_to(source)), files))

    def cold_mount(self) -> float:
        """Mount anew with an empty cache; seconds of the mount."""
        self.umount()
        shutil.rmtree(self.cache, ignore_errors=True)
        begun = time.perf_counter()
        self.mount()
        return time.perf_counter() - begun

    def umount(self) -> None:
        """Unmount and wait until its process has gone."""
        if os.path.ismount(self.mountpoint):
            run(self._program, "umount", self.mountpoint)
        until = time.monotonic() + 30
        while os.path.ismount(self.mountpoint) or self._serves():
            if time.monotonic() > until:
                raise SystemExit("bench: JuiceFS does not end after its unmount")
            time.sleep(0.05)

    def _serves(self) -> bool:
        found = subprocess.run(["pgrep", "-f", f"juicefs mount.* {self.mountpoint}"], capture_output=True, check=False)
        return found.returncode == 0


class RangedGets:
    """A file fetched from the bucket by parallel ranged GETs and written to the same disk: the limit for a cold start."""

    def __init__(self, work: Path, source: Path, config: dict[str, Any]) -> None:
        self._store: Any = obstore.store.S3Store(**config)
        self._target = work / "fetched"
        self._size = source.stat().st_size
        with source.open("rb") as file:
            self._store.put("large.bin", file)

    def fetch(self) -> float:
        """Seconds to fetch all of it."""
        self._target.unlink(missing_ok=True)
        begun = time.perf_counter()
        fd = os.open(self._target, os.O_WRONLY | os.O_CREAT)
        try:
            os.truncate(fd, self._size)
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(pool.map(lambda start: self._part(fd, start), range(0, self._size, RANGE)))
        finally:
            os.close(fd)
        return time.perf_counter() - begun

    def _part(self, fd: int, start: int) -> None:
        length = min(RANGE, self._size - start)
        os.pwrite(fd, self._store.get_range("large.bin", start=start, length=length), start)
