"""`make soak`: daemons are killed at random while containers read the same files again and again from a slow store.

    PYTHONPATH=tests .venv/bin/python tests/soak/soak.py [--seconds 600] [--seed N]

The node cache is smaller than what is read and the page cache is dropped all the time, so fetches never end. At the end:
no read failed, no byte differed, nothing is stuck in the kernel, no mount, process or zombie is left, memory stayed
within its limits. Exit code 0 then, 1 otherwise; one line of figures, in JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from support.containerd import versions
from support.mounts import until
from support.slow_node import LAYER, MIB, MODEL, SlowNode

from floe.store.errors import UnavailableError

# Actions and how often each is chosen.
ACTIONS = {"worker": 6, "keeper": 3, "snapshotter": 1, "containerd": 1, "stop": 1, "container": 1}
READERS = 2  # of each file
ENVIRON = {"FLOE_CACHE_SIZE": "32MiB", "FLOE_CACHE_MIN_FREE": "0", "FLOE_READAHEAD": "8MiB"}
LIMITS = {"keeper": 25 * MIB, "worker": 300 * MIB, "snapshotter": 120 * MIB}  # resident bytes
SCRIPT = """n=0
while [ ! -e /tmp/stop ]; do
  s=$(md5sum <$FILE) || { echo a read failed; exit 3; }
  [ "$s" = "$SUM  -" ] || { echo wrong bytes: "$s"; exit 4; }
  n=$((n+1))
done
echo $n"""


class Soak:
    def __init__(self, node: SlowNode, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.peaks: Counter[str] = Counter()
        self.zombies: Counter[int] = Counter()
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.ending = threading.Event()
        self.readers: list[str] = []

    def start_readers(self) -> None:
        node = self.node
        for number in range(2 * READERS):
            file, total = [(MODEL, node.sums[0]), (LAYER, node.sums[1])][number % 2]
            pod = node.cri.run_pod(f"reader-{number}")
            environment = {"FILE": file, "SUM": total}
            self.readers.append(node.cri.run_container(pod, node.reference, ["sh", "-c", SCRIPT], env=environment))

    # in threads of their own

    def drop_pages(self) -> None:
        """Have the kernel forget what it read, file by file: drop_caches would wait for reads in flight."""
        trees = self.node.daemons.run_dir / "trees"
        while not self.ending.wait(0.3):
            for tree in trees.iterdir():
                for name in (MODEL.lstrip("/"), LAYER.lstrip("/")):
                    with contextlib.suppress(OSError), (tree / name).open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def watch(self) -> None:
        """Memory and zombies, once a second."""
        while not self.ending.wait(1.0):
            pids = {"snapshotter": self.node.daemons.snapshotter.pid}
            with contextlib.suppress(OSError, ValueError):
                pids |= {name: self.node.pid(f"{name}.pid") for name in ("keeper", "worker")}
            for name, pid in pids.items():
                self.peaks[name] = max(self.peaks[name], resident(pid))
            dead = {
                pid for pid, (state, parent) in processes().items() if state == "Z" and parent == pids.get("keeper")
            }
            for pid in [*self.zombies]:
                if pid not in dead:
                    del self.zombies[pid]
            self.zombies.update(dead)
            self.problems += [f"worker {pid} stays a zombie" for pid, seconds in self.zombies.items() if seconds == 5]

    # faults

    def act(self) -> None:
        proxy = self.node.proxy
        proxy.latency, proxy.rate = self.random.choice([0.0, 0.02, 0.2]), self.random.choice([2 * MIB, 8 * MIB, None])
        (proxy.hold if self.random.random() < 0.2 else proxy.go)()
        action = self.random.choices([*ACTIONS], [*ACTIONS.values()])[0]
        if self.node.inflight():
            self.done["with fetches in flight"] += 1
        getattr(self, f"act_{action}")()
        self.done[action] += 1
        for container in self.readers:
            if self.node.cri.status(container).state != self.node.cri.pb.CONTAINER_RUNNING:
                raise AssertionError(f"a reader ended: {self.node.cri.logs(container)!r}")
        self.ending.wait(self.random.random() * 1.5)

    def act_worker(self) -> None:
        old = self.node.pid("worker.pid")
        os.kill(old, signal.SIGKILL)
        until(lambda: self.node.serving() not in (0, old), 30)

    def act_keeper(self) -> None:
        daemons = self.node.daemons
        daemons.packfs.kill()
        daemons.packfs.wait()
        self.ending.wait(self.random.random() * 0.5)
        daemons.packfs = daemons.start("packfs")

    def act_snapshotter(self) -> None:
        self.node.daemons.restart_snapshotter()

    def act_containerd(self) -> None:
        self.node.containerd.kill()
        self.node.containerd.start()
        until(self.node.cri.ready, 30)

    def act_stop(self) -> None:
        """SIGTERM with packs in use, and the next start."""
        daemons, first = self.node.daemons, self.node.daemons.packfs
        log = daemons.log("packfs")
        said = log.read_text().count("packs are in use")
        first.terminate()
        until(lambda: log.read_text().count("packs are in use") > said, 20)
        daemons.packfs = daemons.start("packfs")
        if first.wait(20) != 0:
            raise AssertionError(f"the stopped keeper ended with {first.returncode}")

    def act_container(self) -> None:
        """A container comes and goes; its program's pages may be fetched anew."""
        self.node.proxy.go()
        cri = self.node.cri
        container = cri.run_container(next(iter(cri.pods)), self.node.reference, ["true"])
        if cri.wait(container, 60) != 0:
            raise AssertionError("a new container failed")
        cri.remove_container(container)

    # the end

    def finish(self) -> dict[str, object]:
        """Stop the readers and say what was done; AssertionError when one failed."""
        node = self.node
        node.answer()
        rounds = 0
        for container in self.readers:
            node.cri.execute(container, "touch", "/tmp/stop")
        for container in self.readers:
            code = node.cri.wait(container, 120)
            said = node.cri.logs(container).strip()
            if code != 0:
                raise AssertionError(f"a reader ended with {code}: {said}")
            rounds += int(said)
        status = node.packfs.status()
        self.problems += [
            f"{name} took {self.peaks[name] >> 20} MiB, more than {most >> 20}"
            for name, most in LIMITS.items()
            if self.peaks[name] > most
        ]
        if status["errors"]:
            self.problems.append(f"the last worker answered {status['errors']} requests with errors")
        kept = ("workers", "takeovers", "replayers", "replayed")
        figures: dict[str, object] = {**self.done, "files_read_whole": rounds, **{key: status[key] for key in kept}}
        return {**figures, "peak_mib": {name: size >> 20 for name, size in self.peaks.items()}}


def processes() -> dict[int, tuple[str, int]]:
    """Every process's state letter and parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_text("utf-8", "replace").rpartition(")")[2].split()
            found[int(path.parent.name)] = (state, int(parent))
    return found


def resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return 0


def left_over(base: Path, before: set[int]) -> list[str]:
    """What a node that was taken down must not leave: mounts, processes, and anything that the kernel does not let go."""
    mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    found = [f"mount left: {line.split()[4]}" for line in mounts if line.split()[4].startswith(f"{base}/")]
    for pid, (state, _) in processes().items():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid not in before and pid != os.getpid() and (os.fsencode(base) in words or (words and state == "D")):
                found.append(f"process left, state {state}: {pid} {words[:200]!r}")
    return found


def soak(base: Path, seconds: float, seed: int) -> tuple[dict[str, object], list[str]]:
    before = set(processes())
    node = SlowNode(base, versions()[-1], environ=ENVIRON)
    run = Soak(node, seed)
    threads = [threading.Thread(target=target) for target in (run.drop_pages, run.watch)]
    figures: dict[str, object] = {}
    try:
        run.start_readers()
        for thread in threads:
            thread.start()
        until_ = time.monotonic() + seconds
        while time.monotonic() < until_ and not run.problems:
            run.act()
        figures = run.finish()
    except (AssertionError, OSError, UnavailableError) as error:
        run.problems.append(f"{type(error).__name__}: {error}")
        figures = dict(run.done)
    finally:
        run.ending.set()
        for thread in threads:
            thread.join()
        try:
            node.close()
        except (AssertionError, OSError) as error:
            run.problems.append(f"taking the node down: {error}")
    with contextlib.suppress(AssertionError):
        until(lambda: not left_over(base, before), 10)
    return figures, [*run.problems, *left_over(base, before)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="floe-soak-", dir="/var/tmp"))
    figures, problems = soak(base, options.seconds, options.seed)
    print(json.dumps({"seed": options.seed, "seconds": options.seconds, **figures, "problems": problems}))
    if problems:
        print(f"logs are in {base}", file=sys.stderr)
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
