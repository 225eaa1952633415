"""Programs of the machine, run; files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bootstrap.errors import NodeError

_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/home/containerd/usr/local/bin"
_SECONDS = 120.0


def find(program: str) -> str | None:
    """Where a program is: on the PATH, or where systems keep what only root runs."""
    return shutil.which(program) or shutil.which(program, path=_PLACES)


def run(
    *command: str | Path,
    check: bool = True,
    seconds: float = _SECONDS,
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
    hint: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run to its end; `text` is its standard input. NodeError when it fails (with `check`), hangs or is not there."""
    words = [str(word) for word in command]
    name = " ".join(words)
    program = words[0] if "/" in words[0] else find(words[0])
    if program is None:
        raise NodeError(f"there is no program {words[0]}", hint or f"install what has {words[0]}")
    try:
        done = subprocess.run(
            [program, *words[1:]],
            input=text or "",
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
            env={**(environ if environ is not None else os.environ), "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired:
        raise NodeError(
            f"{name}: not done within {seconds:g} s", hint or "run it by hand, and see what it waits for"
        ) from None
    except OSError as error:
        raise NodeError(f"{name}: {error.strerror}", hint) from error
    if check and done.returncode != 0:
        raise NodeError(f"{name} failed: {last_lines(done.stderr or done.stdout)}", hint or "run it by hand")
    return done


def last_lines(text: str, number: int = 3) -> str:
    """The end of what a program said, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-number:])[:600] or "it said nothing"


def say(text: str) -> None:
    """Progress, for people who wait at a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"bootstrap-node: {text}\n")
        sys.stderr.flush()


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Replace a file at once, durably. NodeError."""
    # One name for all runs, of which there is one at a time: what a killed one leaves the next one takes.
    new = path.with_name(f".{path.name}.floe-new")
    try:
        try:
            new.unlink(missing_ok=True)
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise NodeError(f"cannot write {path}: {error.strerror}", "see whether its disk can be written") from error


def sync_folder(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> str:
    """A file's text, empty where there is none."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def booted() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


def systemctl(*arguments: str, check: bool = True, seconds: float = 400.0) -> subprocess.CompletedProcess[str]:
    """systemctl, which may have to wait for units to be up."""
    unit = arguments[-1] if len(arguments) > 1 else ""
    return run("systemctl", *arguments, check=check, seconds=seconds, hint=f"journalctl -u {unit}" if unit else "")


def property_of(unit: str, name: str) -> str:
    """What systemd says of a unit; empty where it knows none."""
    return run("systemctl", "show", "--property", name, "--value", unit, check=False).stdout.strip()


def is_mountpoint(path: str, mounts: Sequence[str]) -> bool:
    """Whether something is mounted at exactly that place."""
    return path.rstrip("/") in mounts
