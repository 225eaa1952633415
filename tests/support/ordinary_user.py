"""A user who is not root, on a machine whose /dev/fuse anyone may use, as udev makes it: a mount namespace of its own.

Root's store is copied to the user; cache and run directory are the ones that the command chooses for such a user.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import sweep

UID = 65534  # nobody: fusermount3 wants a name in the list of users
_SETUP = """
mount -t tmpfs none "$0" && mknod "$0/fuse" c 10 229 && chmod 666 "$0/fuse" && mount --bind "$0/fuse" /dev/fuse &&
umount -l "$0" && echo ready && read -r end
"""


class OrdinaryUser:
    """`home` is the user's; commands see mounts that are made in this namespace, and only they."""

    def __init__(self) -> None:
        self.home = sweep.folder("user", Path("/var/tmp"))
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(("FLOE_", "XDG_"))}
        self.environ |= {"HOME": str(self.home), "FLOE_CONFIG": "", "FLOE_STORE": f"file://{self.home}/store"}
        os.chown(self.home, UID, UID)
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SETUP, self.home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.cache = self.home / ".cache" / "floe" / "node"

    def take_store(self, store: Path) -> None:
        """Have a copy of this store."""
        shutil.copytree(store, self.home / "store")
        subprocess.run(["chown", "-R", f"{UID}:{UID}", self.home], check=True)

    def command(self, *argv: object) -> list[str]:
        """What runs `argv` as this user; `fusermount3` must keep its privileges, so none are given up for good."""
        enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        return [*enter, *user, *map(str, argv)]

    def run(self, *argv: object, code: int = 0, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        done = subprocess.run(
            self.command(*argv),
            env=self.environ,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == code, (argv, done.stdout, done.stderr)
        return done

    def floe(self, *argv: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        done = self.run(sys.executable, "-m", "floe", *argv, code=code)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *argv: object):
        """What it prints with --json."""
        return json.loads(self.floe(*argv, "--json").stdout)

    def python(self, script: str, *argv: object) -> str:
        """What a Python program prints, which finds tests' `support`."""
        start = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        return self.run(sys.executable, "-c", start + script, *argv).stdout

    def mounts(self) -> list[str]:
        """Mountpoints below the home."""
        text = self.run("cat", "/proc/self/mountinfo").stdout
        return [line.split()[4] for line in text.splitlines() if line.split()[4].startswith(f"{self.home}/")]

    def servers(self) -> list[int]:
        """Processes that serve its mounts."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if path.stat().st_uid == UID and b"floe.fuse.portable" in (path / "cmdline").read_bytes():
                    environ = (path / "environ").read_bytes()
                    if f"HOME={self.home}".encode() in environ:
                        found.append(int(path.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        """Unmount, end, remove."""
        for place in self.mounts():
            subprocess.run(self.command("fusermount3", "-u", "-z", place), check=False, timeout=20)
        for pid in self.servers():
            with contextlib.suppress(ProcessLookupError):  # those that the unmounting ends
                os.kill(pid, 9)
        self._holder.communicate("\n", timeout=20)
        shutil.rmtree(self.home, ignore_errors=True)
