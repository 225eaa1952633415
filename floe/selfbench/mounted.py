"""A model read through a mount of its own: the `floe` command with a private cache and run directory in the scratch folder.

The user's cache, daemons and start-up profiles are left alone, so that the first reading is a first one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from floe.selfbench.disk import drop_pages
from floe.selfbench.figures import Mount, percentile
from floe.selfbench.plan import SMALL_BYTES, SMALL_FILES
from floe.selfbench.scratch import Scratch
from floe.store.errors import UnavailableError

MADE = "bench:made"
_LOOKED_AT = 20000  # files of the model, at most
_SMALL = 128 << 10  # bytes of a file that counts as small, at most
_PIECE = 1 << 20
_COMMAND = 120.0  # seconds a floe command may take
_TICKS = 10  # of the kernel's clock for processor time; of fewer no share can be told


@dataclass(frozen=True)
class Node:
    """Settings of the private node, as flags: `shared` for every command, `mounting` for a mount besides."""

    shared: Sequence[str]
    mounting: Sequence[str]

    def floe(self, *words: str) -> None:
        """Run a command in a session of its own: an interrupt of ours must not end it halfway.

        UnavailableError with what it said when it fails.
        """
        environ = {key: value for key, value in os.environ.items() if not key.startswith("FLOE_")}
        with subprocess.Popen(
            [sys.executable, "-m", "floe", *words],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
        ) as process:
            try:
                _, said = process.communicate(timeout=_COMMAND)
            except subprocess.TimeoutExpired:
                process.kill()
                raise UnavailableError(f"floe {words[0]} did not end within {_COMMAND:g} s") from None
            except BaseException:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_COMMAND)
                raise
        if process.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            told = next((line.removeprefix("floe: error: ") for line in lines if "error" in line), lines[-1:] or "")
            raise UnavailableError(f"floe {' '.join(words[:2])} failed: {told}")

    def umount(self, place: Path) -> None:
        """Undo a mount of a model."""
        self.floe("umount", str(place), *self.shared)


def make_model(node: Node, scratch: Scratch, size: int) -> None:
    """Push a model of one file of `size` bytes and SMALL_FILES small ones, as MADE, into the node's store."""
    folder = scratch.root / "model"
    folder.mkdir()
    with (folder / "weights.bin").open("wb") as file:
        for start in range(0, size, _PIECE):
            file.write(os.urandom(min(_PIECE, size - start)))
    for number in range(SMALL_FILES):
        path = folder / f"{number // 20:02d}" / f"{number:03d}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(SMALL_BYTES + number))
    node.floe("model", "push", str(folder), MADE, *node.shared, f"--spool-dir={scratch.root / 'spool'}")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in (scratch.root / "store").rglob("*"):
        if path.is_file():
            drop_pages(path)


def measure(node: Node, scratch: Scratch, model: str, size: int, seconds: float) -> Mount:
    """Mount `model`, read `size` bytes of its largest files, once and again, then small files; and unmount.

    `seconds` for each of the three at most. UnavailableError, DeadlineError; OSError when a read fails.
    """
    begun = time.perf_counter()
    node.floe("model", "mount", model, str(scratch.mountpoint), *node.shared, *node.mounting)
    mounting = time.perf_counter() - begun
    files = _files(scratch.mountpoint)
    large = sorted((file for file in files if file[0] > _SMALL), reverse=True) or files
    small = sorted(path for length, path in files if 0 < length <= _SMALL)[:SMALL_FILES]
    busy = _busy()
    first, first_seconds = _read(large, size, seconds)
    busy = _busy() - busy
    waits = _each(small, seconds)
    for _, path in large:
        drop_pages(path)
    again, again_seconds = _read(large, first, seconds)
    for path in small:
        drop_pages(path)
    warm = _each(small[: len(waits)], seconds)
    node.umount(scratch.mountpoint)
    return Mount(
        model=model,
        from_store=model != MADE,
        mount_seconds=mounting,
        bytes=first,
        first_bytes_per_second=first / first_seconds,
        cpu_share_of_first=_share(busy, first_seconds),
        again_bytes_per_second=again / again_seconds,
        small_files=len(waits),
        small_first_files_per_second=len(waits) / sum(waits) if waits else None,
        small_first_median_seconds=percentile(waits, 0.5) if waits else None,
        small_again_files_per_second=len(warm) / sum(warm) if warm else None,
    )


def _files(root: Path) -> list[tuple[int, Path]]:
    """Size and path of regular files, as many as are looked at."""
    found: list[tuple[int, Path]] = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                found.append((path.stat().st_size, path))
        if len(found) >= _LOOKED_AT:
            break
    return found


def _read(files: Sequence[tuple[int, Path]], size: int, seconds: float) -> tuple[int, float]:
    """Read files one after another, up to `size` bytes: bytes and seconds."""
    buffer = bytearray(_PIECE)
    done = 0
    begun = time.perf_counter()
    for _, path in files:
        with path.open("rb", buffering=0) as file:
            while done < size and (not done or time.perf_counter() - begun < seconds):
                got = file.readinto(buffer)
                if not got:
                    break
                done += got
    return done, max(time.perf_counter() - begun, 1e-9)


def _busy() -> float:
    """Processor seconds that all of this machine has spent. Source: proc_stat(5)."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _share(busy: float, seconds: float) -> float | None:
    """How much of all cores `busy` processor seconds are; None where `seconds` are too few ticks to tell."""
    if seconds * os.sysconf("SC_CLK_TCK") < _TICKS:
        return None
    return min(1.0, busy / seconds / (os.cpu_count() or 1))


def _each(paths: Sequence[Path], seconds: float) -> list[float]:
    """Seconds that each file took, opened and read whole, one after another."""
    waits: list[float] = []
    until = time.monotonic() + seconds
    for path in paths:
        if waits and time.monotonic() >= until:
            break
        begun = time.perf_counter()
        path.read_bytes()
        waits.append(time.perf_counter() - begun)
    return waits
