"""What goes wrong, at random: processes are killed, the line to the store, the index and the cache's disk fail for moments.

Every fault is far shorter than `read_deadline`, so no read has a reason to fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from soak.tally import Tally
from soak.world import MIB, World
from support.mounts import until

_BACK = 120.0  # seconds for a successor to serve
KILLED = ("worker", "keeper", "snapshotter", "containerd")


class Killer:
    """Kills `names` in turn at random so that each dies `wanted` times in `seconds`, evenly. Runs in a thread of its own.

    A process is killed once its predecessor's successor has served for a while, or not even: a worker may die that is
    starting.
    """

    def __init__(
        self, world: World, tally: Tally, seed: int, names: tuple[str, ...], wanted: int, seconds: float
    ) -> None:
        self._world, self._tally = world, tally
        self._random = random.Random(seed)
        self._names, self._wanted, self._seconds = names, wanted, seconds

    @property
    def done(self) -> bool:
        """Whether each was killed as often as wanted."""
        return all(self._tally.counts["kills"][name] >= self._wanted for name in self._names)

    def run(self) -> None:
        while not self._tally.ending.is_set():
            before = time.monotonic()
            share = self._tally.seconds / self._seconds
            behind = [name for name in self._names if self._tally.counts["kills"][name] < share * self._wanted]
            if behind:
                self._kill(self._random.choice(behind))
            elif self._random.random() < 0.03:
                self._rare()
            # On a busy machine successors are slow to come: what they serve must get on meanwhile, kills wait for that.
            self._tally.pause(self._random.random() * 0.5 + time.monotonic() - before)

    def _kill(self, name: str) -> None:
        getattr(self, f"_kill_{name}")()

    def _count(self, name: str) -> None:
        self._tally.count("kills", name)

    def _rare(self) -> None:
        if "worker" in self._names:
            self._random.choice((self._kill_both, self._stop_packfs, self._freeze_worker))()
        else:
            self._random.choice((self._kill_helper, self._stop_snapshotter, self._stop_containerd))()

    # the pack filesystem

    def _kill_worker(self) -> None:
        old = self._world.serving() or self._world.pid("worker")
        if not old:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(old, signal.SIGKILL)
            self._count("worker")
        if self._random.random() < 0.3:  # its successor early in its life, too
            with contextlib.suppress(AssertionError):
                until(lambda: self._world.pid("worker") not in (0, old), 3)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._world.pid("worker"), signal.SIGKILL)
                    self._count("worker")
                old = self._world.pid("worker")
        until(lambda: self._world.serving() not in (0, old), _BACK)

    def _kill_keeper(self) -> None:
        node = self._world.node
        node.packfs.kill()
        node.packfs.wait()
        self._count("keeper")
        self._tally.pause(self._random.random() * 0.7)
        node.packfs = node.start("packfs")

    def _kill_both(self) -> None:
        """Only with a descriptor store: without one the mount is lost, and that is said."""
        if not self._world.stored:
            return
        node, worker = self._world.node, self._world.pid("worker")
        pids = [node.packfs.pid, worker]
        self._random.shuffle(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.packfs.wait()
        self._count("keeper and worker at once")
        self._tally.pause(self._random.random() * 0.7)
        node.packfs = node.start("packfs")

    def _stop_packfs(self) -> None:
        """SIGTERM: with packs in use the keeper stays until the next start takes over."""
        node, first = self._world.node, self._world.node.packfs
        log = node.log("packfs")
        said = log.read_text().count("packs are in use")
        first.terminate()
        until(lambda: first.poll() is not None or log.read_text().count("packs are in use") > said, _BACK)
        self._tally.pause(self._random.random())
        if node.store_of_descriptors:
            node.store_of_descriptors.forget()
        until(self._start_packfs, _BACK)
        if first.wait(_BACK) != 0:
            raise AssertionError(f"the keeper that was stopped ended with {first.returncode}")
        self._tally.count("faults", "packfs stopped and started")

    def _start_packfs(self) -> bool:
        """Whether it started: a mount of a model that found none may have started its own, which has to go first."""
        node = self._world.node
        try:
            node.packfs = node.start("packfs")
        except AssertionError as error:
            if "belongs to a running keeper" not in str(error).splitlines()[-1]:
                raise
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._world.pid("keeper"), signal.SIGTERM)
            return False
        return True

    def _freeze_worker(self) -> None:
        pid = self._world.serving()
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._tally.pause(self._random.random() * 3)
            os.kill(pid, signal.SIGCONT)
            self._tally.count("faults", "worker frozen")

    # containerd and the snapshotter

    def _kill_snapshotter(self) -> None:
        node = self._world.node
        node.snapshotter.kill()
        node.snapshotter.wait()
        self._count("snapshotter")
        self._tally.pause(self._random.random() * 0.7)
        node.snapshotter = node.start("snapshotter")

    def _kill_containerd(self) -> None:
        self._world.containerd.kill()
        self._count("containerd")
        self._tally.pause(self._random.random() * 0.7)
        self._start_containerd()

    def _start_containerd(self) -> None:
        self._world.containerd.start()
        until(self._world.cri.ready, _BACK)

    def _stop_snapshotter(self) -> None:
        node = self._world.node
        node.snapshotter.terminate()
        if node.snapshotter.wait(_BACK) != 0:
            raise AssertionError(f"the snapshotter that was stopped ended with {node.snapshotter.returncode}")
        node.snapshotter = node.start("snapshotter")
        self._tally.count("faults", "snapshotter stopped and started")

    def _stop_containerd(self) -> None:
        self._world.containerd.process.terminate()
        self._world.containerd.process.wait(_BACK)
        self._start_containerd()
        self._tally.count("faults", "containerd stopped and started")

    def _kill_helper(self) -> None:
        """A mount process, if one is caught at work."""
        run_dir = os.fsencode(self._world.node.run_dir)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words = path.read_bytes()
                    if b"floe.mount.helper" in words and _mentions(path.parent, run_dir):
                        os.kill(int(path.parent.name), signal.SIGKILL)
                        self._count("mount helper")
                        return


def _mentions(process: Path, run_dir: bytes) -> bool:
    """Whether its parent, or that one's, is of this run: a helper's own words do not tell."""
    for _ in range(2):
        parent = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        process = Path(f"/proc/{parent}")
        if run_dir in (process / "environ").read_bytes():
            return True
    return False


class Weather:
    """One fault of the surroundings after the other, with pauses. Runs in a thread of its own."""

    def __init__(self, world: World, tally: Tally, seed: int) -> None:
        self._world, self._tally = world, tally
        self._random = random.Random(seed)
        self._kinds: dict[Callable[[], None], int] = {
            self._slow: 4, self._silent: 2, self._refusing: 2, self._resets: 2, self._cut_short: 2, self._throttled: 2,
            self._flips: 3, self._index_away: 2, self._index_empty: 1, self._cache_disk_full: 2,
        }  # fmt: skip

    def run(self) -> None:
        while not self._tally.ending.is_set():
            fault = self._random.choices([*self._kinds], [*self._kinds.values()])[0]
            self._tally.count("faults", fault.__name__.lstrip("_").replace("_", " "))
            try:
                fault()
            finally:
                self._world.line.clear()
            self._tally.pause(self._random.random() * 4)

    def _last(self, longest: float) -> None:
        self._tally.pause(0.3 + self._random.random() * longest)

    def _slow(self) -> None:
        line = self._world.line
        line.latency, line.rate = self._random.choice([0.0, 0.05, 0.3]), self._random.choice([MIB, 4 * MIB, 16 * MIB])
        self._last(6)

    def _silent(self) -> None:
        self._world.line.hold()
        self._last(5)

    def _refusing(self) -> None:
        self._world.line.refusing = True
        self._last(5)

    def _resets(self) -> None:
        self._world.line.reset = self._random.choice([0.02, 0.2])
        self._last(5)

    def _cut_short(self) -> None:
        self._world.line.truncate = self._random.choice([0.02, 0.2])
        self._last(5)

    def _throttled(self) -> None:
        self._world.line.throttle = self._random.choice([0.2, 0.8])
        self._last(5)

    def _flips(self) -> None:
        self._world.line.flip = 0.3
        self._last(5)

    def _index_away(self) -> None:
        self._world.redis.stop()
        self._last(4)
        self._world.redis.start()

    def _index_empty(self) -> None:
        self._world.redis.restart_empty()

    def _cache_disk_full(self) -> None:
        ballast = self._world.cache / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while file.write(bytes(MIB)):
                        pass
                with contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
            self._last(5)
        finally:
            with contextlib.suppress(FileNotFoundError):
                ballast.unlink()


class Forgetting:
    """Has the kernel forget what it read, file by file: drop_caches would wait for reads in flight."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._trees, self._tally = world.node.run_dir / "trees", tally

    def run(self) -> None:
        while self._tally.pause(0.5):
            for tree in self._shown():
                for name in ("plain", "data/plain", "bin"):
                    self._forget(tree / name)

    def _shown(self) -> list[Path]:
        try:
            return [*self._trees.iterdir()]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            return []

    def _forget(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # a tree that goes
            for path in folder.iterdir():
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
