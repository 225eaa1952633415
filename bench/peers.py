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


def s3_config(bucket: str, endpoint: str, keys: tuple[str, str]) -> dict[str, Any]:
    """obstore's settings for a bucket of an S3 server without TLS at `endpoint` (URL)."""
    access, secret = keys
    return {
        "bucket": bucket,
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": access,
        "secret_access_key": secret,
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }


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

    def mount(self, bucket: str | None = None) -> None:
        """Mount in the background; `bucket` (URL) is another way to the same bucket."""
        other = ("--bucket", bucket) if bucket else ()
        run(
            self._program, "mount", "--background", "--no-usage-report", "--cache-dir", self.cache, *other,
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

    def cold_mount(self, bucket: str | None = None) -> float:
        """Mount anew with an empty cache; seconds of the mount."""
        self.umount()
        shutil.rmtree(self.cache, ignore_errors=True)
        begun = time.perf_counter()
        self.mount(bucket)
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
    """Objects fetched from a bucket by parallel ranged GETs and written to files on the same disk: the limit for a cold start."""

    def __init__(self, work: Path, config: dict[str, Any], connections: int = CONNECTIONS) -> None:
        self._store: Any = obstore.store.S3Store(**config)
        self._folder = work / "fetched"
        self._connections = connections

    def put(self, key: str, source: Path) -> None:
        """Upload a file as the object `key`."""
        with source.open("rb") as file:
            self._store.put(key, file)

    def fetch(self, *keys: str, sync: bool = False) -> float:
        """Seconds to fetch all of these objects, with `sync` until they are safe on the disk; what was fetched before is removed first."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        sizes = {key: self._store.head(key)["size"] for key in keys}
        begun = time.perf_counter()
        files = {}
        try:
            for number, (key, size) in enumerate(sizes.items()):
                files[key] = os.open(self._folder / str(number), os.O_WRONLY | os.O_CREAT)
                os.truncate(files[key], size)
            with ThreadPoolExecutor(self._connections) as pool:
                parts = [(key, start) for key, size in sizes.items() for start in range(0, size, RANGE)]
                list(pool.map(lambda part: self._part(files[part[0]], *part, sizes[part[0]]), parts))
            if sync:
                for file in files.values():
                    os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)
        return time.perf_counter() - begun

    def random(self, key: str, offsets: list[int], length: int) -> list[float]:
        """Seconds of each of these small GETs, one after another."""
        seconds = []
        for start in offsets:
            begun = time.perf_counter()
            self._store.get_range(key, start=start, length=length)
            seconds.append(time.perf_counter() - begun)
        return seconds

    def _part(self, file: int, key: str, start: int, size: int) -> None:
        length = min(RANGE, size - start)
        os.pwrite(file, self._store.get_range(key, start=start, length=length), start)
