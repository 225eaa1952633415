"""The kernel's own file systems on the same data: what Floe is measured against."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from floe.mount import syscalls

MIB = 1 << 20


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command; ends the bench with its message when it fails."""
    result = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))} failed: {result.stderr.strip()}")


@contextmanager
def ext4(work: Path, data: Path, size: int) -> Iterator[Path]:
    """A fresh ext4 on a loop device, so that both native file systems read one file on the same disk."""
    image, folder = work / "ext4.img", work / "ext4"
    with image.open("wb") as file:
        file.truncate(size * 5 // 4 + 256 * MIB)
    run("mkfs.ext4", "-q", "-F", "-d", data, image)
    folder.mkdir()
    run("mount", "-t", "ext4", "-o", "ro,loop", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@contextmanager
def erofs(work: Path, data: Path) -> Iterator[Path]:
    """An uncompressed EROFS image by mkfs.erofs, mounted on the file itself; 1 MiB of read-ahead, as Floe sets it."""
    image, folder = work / "native.erofs", work / "erofs"
    folder.mkdir()
    run("mkfs.erofs", "--quiet", image, data)
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
        set_read_ahead(folder, 1024)
        yield folder
    finally:
        run("umount", folder)


def set_read_ahead(mountpoint: Path, kib: int) -> None:
    """Read-ahead of the EROFS mount at `mountpoint`; Floe's tree mounter sets 1024 KiB."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        name = syscalls.sysfs_name(fd)
    finally:
        os.close(fd)
    if name is None:
        raise SystemExit("bench: this kernel does not tell the name of a mount in sysfs (Linux 6.9 and later do)")
    Path(f"/sys/class/bdi/{name.partition('/')[2]}/read_ahead_kb").write_text(str(kib))
