"""Which containerd a configuration is for: of the binary, or as the user says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from floe.store.errors import BadInputError, NotFoundError, UnavailableError, UnsupportedError

_SECONDS = 20.0  # for a program that prints and ends
_NUMBER = re.compile(r"\bv?(\d+)\.(\d+)(?:\.(\d+))?")
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/home/containerd/usr/local/bin"


@dataclass(frozen=True, order=True)
class Version:
    """Of containerd: 1.6, 1.7 or 2.x; `parse` refuses others."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """`1.7`, `v2.1.9`, or what `containerd --version` prints. BadInputError, UnsupportedError."""
        found = _NUMBER.search(text)
        if found is None:
            raise BadInputError(
                f"{text.strip()[:80]!r} names no version of containerd", hint="write for example 1.7 or 2.1"
            )
        version = cls(int(found[1]), int(found[2]))
        if version < cls(1, 6) or version.major > 2:
            raise UnsupportedError(
                f"containerd {version} is none that Floe knows", hint="Floe works with containerd 1.6, 1.7 and 2.x"
            )
        return version

    @property
    def has_runtime_snapshotters(self) -> bool:
        """Whether a runtime may have a snapshotter of its own."""
        return self >= Version(1, 7)

    @property
    def is_2(self) -> bool:
        """2.x: merges tables of imported files, and pulls through the transfer service."""
        return self.major == 2

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def find_binary(given: Path | None) -> Path | None:
    """The containerd to ask: `given`, which must be there, else the first on the PATH and in the usual places, or None."""
    if given is not None:
        if not given.is_file():
            raise NotFoundError(f"there is no containerd at {given}", hint="check --containerd")
        return given
    found = shutil.which("containerd") or shutil.which("containerd", path=_PLACES)
    return Path(found) if found else None


def ask(binary: Path, *arguments: str) -> str:
    """What the program prints. UnavailableError when it fails, with its own words."""
    command = [str(binary), *arguments]
    done = run(command, _SECONDS, hint="check --containerd")
    if done.returncode != 0:
        # With arguments, it was given a configuration to read.
        hint = "mend what it names in that file or its imports" if arguments[0] == "--config" else "check --containerd"
        raise UnavailableError(f"{' '.join(command)} failed: {last_line(done.stderr)}", hint=hint)
    return done.stdout


def run(command: Sequence[str], seconds: float, *, hint: str) -> subprocess.CompletedProcess[str]:
    """What a program of containerd's says, however it ends. UnavailableError when it does not run, or for too long."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{' '.join(command)} does not run: {error}", hint=hint) from error


def detect(binary: Path | None, given: str | None) -> Version:
    """The version: `given`, else the binary's. NotFoundError when there is neither."""
    if given is not None:
        return Version.parse(given)
    if binary is None:
        raise NotFoundError(
            "there is no containerd on this machine, so its version is not known",
            hint="give --containerd FILE, or --containerd-version, for example 2.1",
        )
    return Version.parse(ask(binary, "--version").replace(".com", ""))


def last_line(text: str) -> str:
    """The last that a program said, shortened."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
