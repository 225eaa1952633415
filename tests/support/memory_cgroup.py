"""A memory cgroup of one's own, of either version of the interface; tests that need one are skipped where there is none."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
# By what the root of the hierarchy has: limit, usage, and the file with the count of hits of the limit.
KINDS = (
    (ROOT, "memory.max", "memory.current", "memory.events"),
    (ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.failcnt"),
)
ENTER = "import os,sys; open(sys.argv[1],'w').write(str(os.getpid())); os.execvp(sys.argv[2],sys.argv[2:])"


class MemoryCgroup:
    """Holds what is put into it to `limit` bytes. What is left in it at its close goes on above it."""

    def __init__(self, limit):
        for root, *names in KINDS:
            self.path = root / f"floe-test-{os.getpid()}-{time.monotonic_ns()}"
            self._limit, self._usage, self._hits = (self.path / name for name in names)
            with contextlib.suppress(OSError):
                self.path.mkdir()
                if self._limit.exists():  # on a plain tmpfs a file would be made
                    self.limit(limit)
                    return
            with contextlib.suppress(OSError):
                self.path.rmdir()
        pytest.skip("no memory cgroup can be made here")

    def limit(self, nbytes):
        self._limit.write_text(str(nbytes))

    def usage(self):
        return int(self._usage.read_text())

    def hits(self):
        """How often the limit was met."""
        words = self._hits.read_text().split()
        return int(words[words.index("max") + 1] if "max" in words else words[0])

    def put(self, pid):
        (self.path / "cgroup.procs").write_text(str(pid))

    def command(self, *argv):
        """`argv` started in it."""
        return [sys.executable, "-c", ENTER, str(self.path / "cgroup.procs"), *map(str, argv)]

    def close(self):
        until = time.monotonic() + 20
        while self.path.exists():
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    (self.path.parent / "cgroup.procs").write_text(pid)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            assert time.monotonic() < until, f"{self.path} stays"
            time.sleep(0.02)
