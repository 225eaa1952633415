"""The places the same data is read from. Each subject mounts, names its folder, and takes itself down."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from floe.mount import syscalls

MIB = 1 << 20


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    result = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))} failed: {result.stderr.strip()}")


@contextmanager
def _mounted(mountpoint: Path, *command: str | Path) -> Iterator[Path]:
    mountpoint.mkdir(parents=True)
    _run(*command, mountpoint)
    try:
        yield mountpoint
    finally:
        _run("umount", mountpoint)


@contextmanager
def ext4(work: Path, data: Path, size: int) -> Iterator[Path]:
    """A fresh ext4 on a loop device, so that both native file systems read one file on the same disk."""
    work.mkdir(exist_ok=True)
    image = work / "ext4.img"
    with image.open("wb") as file:
        file.truncate(size * 5 // 4 + 256 * MIB)
    _run("mkfs.ext4", "-q", "-F", "-d", data, image)
    with _mounted(work / "mnt-ext4", "mount", "-t", "ext4", "-o", "ro,loop", image) as folder:
        yield folder


@contextmanager
def native_erofs(work: Path, data: Path) -> Iterator[Path]:
    """An uncompressed EROFS image by mkfs.erofs, mounted on the file itself; 1 MiB of read-ahead, as Floe sets it."""
    work.mkdir(exist_ok=True)
    image, folder = work / "native.erofs", work / "mnt-erofs"
    folder.mkdir(parents=True)
    _run("mkfs.erofs", "--quiet", image, data)
    # Not mount(8): it would put a loop device between the file system and the file.
    context = syscalls.FsContext("erofs")
    try:
        context.path("source", str(image))
        context.flag("ro")
        context.create()
        mount = context.mount(0)
        syscalls.attach(mount, str(folder))
        os.close(mount)
    finally:
        context.close()
    try:
        set_read_ahead(folder)
        yield folder
    finally:
        _run("umount", folder)


def set_read_ahead(mountpoint: Path, kib: int = 1024) -> None:
    """Read-ahead of the EROFS mount at `mountpoint`, as Floe's tree mounter sets it."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        name = syscalls.sysfs_name(fd)
    finally:
        os.close(fd)
    if name is None:
        raise SystemExit("bench: this kernel does not tell the name of a mount in sysfs (Linux 6.9 and later do)")
    Path(f"/sys/class/bdi/{name.partition('/')[2]}/read_ahead_kb").write_text(str(kib))


class FloeNode:
    """A private Floe node (store, cache, run directory) below `work`, driven by the `floe` command."""

    def __init__(self, work: Path) -> None:
        self.work, self.run_dir = work, work / "run"
        self.env = {
            **os.environ,
            "FLOE_STORE": f"file://{work}/store",
            "FLOE_INDEX": f"sqlite:{work}/index.db",
            "FLOE_CACHE_DIR": str(work / "cache"),
            "FLOE_ROOT": str(work / "snapshotter"),
            "FLOE_RUN_DIR": str(self.run_dir),
        }

    def floe(self, *arguments: str | Path) -> None:
        """Run a `floe` command; ends the bench with its message when it fails."""
        _run(sys.executable, "-m", "floe", *arguments, env=self.env)

    @contextmanager
    def mounted(self, model: str, mountpoint: Path) -> Iterator[Path]:
        """The model, mounted by `floe model mount`."""
        mountpoint.mkdir(parents=True)
        self.floe("model", "mount", model, mountpoint)
        try:
            yield mountpoint
        finally:
            self.floe("umount", mountpoint)

    def peak_memory(self, process: str) -> int:
        """Peak resident bytes (VmHWM) of `keeper` or `worker`."""
        pid = (self.run_dir / f"{process}.pid").read_text().strip()
        return peak_memory(int(pid))


def peak_memory(pid: int) -> int:
    """Peak resident bytes of a process. Source: proc(5), VmHWM in /proc/pid/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"bench: process {pid} has no VmHWM")
