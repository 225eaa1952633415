"""The `floe` command on a machine of one's own: private store, cache and run directory; every command a process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Node:
    """The settings of a machine of one's own, and the `floe` command on it."""

    def __init__(self, home):
        self.home = home
        self.store, self.run_dir, self.cache = home / "store", home / "run", home / "cache"
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("FLOE_")}
        self.environ |= {
            "FLOE_STORE": f"file://{self.store}",
            "FLOE_INDEX": f"sqlite:{home}/index.db",
            "FLOE_CACHE_DIR": str(self.cache),
            "FLOE_RUN_DIR": str(self.run_dir),
            "FLOE_ROOT": str(home / "root"),
            "FLOE_CONFIG": str(home / "config.toml"),
            "FLOE_STORE_TIMEOUT": "1",
        }
        (home / "config.toml").write_text("")

    def floe(self, *argv, code=0, timeout=60, **options):
        found = subprocess.run(
            [sys.executable, "-m", "floe", *map(str, argv)],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            **options,
        )
        assert found.returncode == code, (argv, found.stdout, found.stderr)
        assert "Traceback" not in found.stderr
        if code:
            assert found.stdout == ""
            assert any(line.startswith(("floe: error: ", "floe packfs[")) for line in found.stderr.splitlines())
        return found

    def json(self, *argv, **options):
        return json.loads(self.floe(*argv, "--json", **options).stdout)

    def refs(self):
        """What the store names, by key: unchanged means nothing was published."""
        folder = self.store / "refs"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def mounts(self):
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(str(self.home))]

    def processes(self):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(str(self.run_dir) in word for word in words):
                found.append((int(path.parent.name), words))
        return found

    def let_others_in(self):
        """Other users come as far as `home`, which pytest makes for its own user alone."""
        open_to_others(self.home)

    def clean_up(self):
        for target in sorted(self.mounts(), reverse=True):
            if not target.startswith(str(self.run_dir)):
                subprocess.run(["umount", target], check=False, timeout=20)
        for target in sorted(self.mounts(), reverse=True):
            subprocess.run(["umount", target], check=False, timeout=20)
        for pid, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):  # those that the unmounting ends
                os.kill(pid, signal.SIGKILL)
        for target in sorted(self.mounts(), reverse=True):
            subprocess.run(["umount", target], check=False, timeout=20)


def open_to_others(home):
    """Let other users come as far as the folder `home`, through those above it that are this user's."""
    for folder in (home, *home.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
