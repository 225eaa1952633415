"""This machine with a root of its own: kernel, devices and programs are real, and what is written lies in a layer above.

    with OwnRoot(tmp_path) as node:
        done = node.bootstrap("--dry-run", "--image")
        assert not node.changed()

An overlay of `/` in a mount namespace, and `chroot` into it; all of it is gone with the process that holds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bootstrap import environment

from floe.store import mounttable

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "install/bootstrap-node.sh"
# $0: an empty directory; $1: may be written to; $2: may only be read; then other mounts.
_SETUP = """
set -e
base=$0 open=$1 fixed=$2; shift 2
mount -t tmpfs none "$base"
mkdir "$base/up" "$base/work" "$base/root"
mount -t overlay none -o "lowerdir=/,upperdir=$base/up,workdir=$base/work" "$base/root"
for one in /proc /sys /dev "$@" "$open" "$fixed"; do mount --rbind "$one" "$base/root$one"; done
mount -o remount,bind,ro "$base/root$fixed"
mount -t tmpfs none "$base/root/run"
echo ready
read -r end
"""


class OwnRoot:
    """`scratch` may be written to from both sides, and the checkout be read. `environ` is what commands get; there are
    none of Floe's variables in it, and its PATH begins with the Python that a machine has without Floe.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        base = scratch / "own-root"
        base.mkdir()
        self.up, self.root = base / "up", base / "root"
        path = f"{Path(os.path.realpath(sys.executable)).parent}:{os.environ['PATH']}"
        names = ("PATH", "PYTHON", "FLOE_", "GCE_METADATA_")
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(names)} | {"PATH": path}
        needed = [Path(one) for one in (*path.split(":"), sys.prefix, sys.base_prefix, "/usr", "/etc", "/var/lib")]
        others = [one.target for one in mounttable.mounts() if _holds(Path(one.target), needed)]
        self._holder = subprocess.Popen(
            # What others unmount meanwhile is unmounted here too.
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _SETUP, base, scratch, ROOT, *others],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self.close()
            raise AssertionError("no root of its own: see what was said above")
        self._seen = Path(f"/proc/{self._holder.pid}/root")

    def __enter__(self) -> OwnRoot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill whoever holds it: its mounts are gone with it."""
        self._holder.kill()
        self._holder.wait()
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream is not None:
                stream.close()

    def path(self, name: str) -> Path:
        """A file of this root, as it is seen from outside."""
        return Path(f"{self._seen}{self.root}/{name.lstrip('/')}")

    def command(self, *words: str | Path, isolated: bool = False) -> list[str | Path]:
        """The command line that runs another one in this root; `isolated`: without a network."""
        unshare, chroot = (shutil.which(name) or name for name in ("unshare", "chroot"))
        alone = [unshare, "--net"] if isolated else []
        return self.beside(*alone, chroot, self.root, *words)

    def beside(self, *words: str | Path) -> list[str | Path]:
        """The command line that runs another one where this root is a directory, `root`, as a host's is in a pod."""
        return [shutil.which("nsenter") or "nsenter", "--target", str(self._holder.pid), "--mount", "--", *words]

    def run(
        self, *words: str | Path, environ: Mapping[str, str] | None = None, seconds: float = 100, **options: bool
    ) -> subprocess.CompletedProcess[str]:
        """A command in this root, whatever it ends with."""
        assert self._holder.poll() is None, f"the holder {self._holder.pid} ended with {self._holder.returncode}"
        return subprocess.run(
            self.command(*words, **options),
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    def bootstrap(self, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """bootstrap-node.sh of this checkout."""
        return self.run(SCRIPT, *words, **options)  # type: ignore[arg-type]

    def boot(self, **options: object) -> subprocess.CompletedProcess[str]:
        """What floe-node.service starts at a boot."""
        python, program = "/opt/floe/current/bin/python", "/opt/floe/node/bootstrap"
        return self.run(python, "-I", "-B", program, "--boot", **options)  # type: ignore[arg-type]

    def changed(self) -> dict[str, tuple[int, ...]]:
        """All that was written since, below /run too, with what would tell that it was written again.

        A directory counts when it is new, or not as it was; what is taken away counts as a device 0:0, as overlayfs has it.
        """
        found = {}
        for layer, place in ((Path(f"{self._seen}{self.up}"), "/"), (self.path("/run"), "/run/")):
            for path in sorted(layer.rglob("*")):
                name, state = place + str(path.relative_to(layer)), path.lstat()
                if not stat.S_ISDIR(state.st_mode):
                    found[name] = (state.st_mode, state.st_uid, state.st_size, state.st_mtime_ns)
                elif not (place == "/" and _same_folder(Path(name), state)):
                    found[name] = (state.st_mode, state.st_uid)
        return found

    def boots(self) -> None:
        """Have the sign that systemd runs this machine; it answers nobody."""
        self.path("/run/systemd/system").mkdir(parents=True)

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A file of this root."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def mounts(self) -> dict[str, str]:
        """What of this root's is mounted below /mnt: places, and devices."""
        told = self.run("findmnt", "--raw", "--noheadings", "--output", "TARGET,SOURCE").stdout
        pairs = (line.split()[:2] for line in told.splitlines())
        return {target: source for target, source in pairs if target.startswith("/mnt/floe")}

    def restart(self) -> None:
        """What a reboot does to mounts and to /run."""
        for target in self.mounts():
            done = self.run("umount", target)
            assert done.returncode == 0, done.stderr
        for path in self.path("/run").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def put_program(self) -> str:
        """The environment that an earlier run has built of this checkout: the tests' own. Its name."""
        name = environment.identity(ROOT)
        place = f"/opt/floe/versions/{name}"
        self.write(f"{place}/bin/floe", f'#!/bin/sh\nexec {Path(sys.executable).parent}/floe "$@"\n', 0o755)
        self.write(f"{place}/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n', 0o755)
        self.write(f"{place}/complete", "")
        return name


def _same_folder(before: Path, now: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        state = before.lstat()
        return (state.st_mode, state.st_uid, state.st_gid) == (now.st_mode, now.st_uid, now.st_gid)
    return False


def _holds(target: Path, needed: list[Path]) -> bool:
    """Whether one of these lies on what is mounted at `target`, which the overlay of `/` does not show."""
    return target != Path("/") and any(one.is_relative_to(target) for one in needed)
