"""Readers and daemons that have no memory to spare, and a disk that others write to without pause."""

import os
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from support.floe_daemons import Daemons
from support.floe_node import wait_until
from support.memory_cgroup import MemoryCgroup

from floe.store import process

MIB = 1 << 20
SIZE = 48 * MIB
FETCH_MEMORY = 32 * MIB
BASE = 128 * MIB  # what a worker takes beside `fetch_memory`; docs/OPERATIONS.md, "Memory"
READ = """
import hashlib, mmap, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as file:
    if sys.argv[2] == "mmap":
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
            for at in range(0, len(mapped), 1 << 20):
                digest.update(mapped[at : at + (1 << 20)])
    else:
        while piece := file.read(1 << 20):
            digest.update(piece)
print(digest.hexdigest())
"""


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h", {"FLOE_FETCH_MEMORY": str(FETCH_MEMORY), "FLOE_PROFILES": "off"})
    yield made
    made.close()


@pytest.fixture
def mounted(daemons, tmp_path):
    """A model of SIZE bytes, nothing of it in the cache; its file in the mount and the digest of that."""
    folder, mountpoint = tmp_path / "m", tmp_path / "mnt"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(SIZE))
    daemons.floe("model", "push", folder, "iris")
    daemons.floe("model", "mount", "iris", mountpoint)
    yield mountpoint / "weights", subprocess.check_output(["sha256sum", folder / "weights"], text=True).split()[0]
    daemons.floe("umount", mountpoint)


@pytest.fixture
def cgroup():
    with ExitStack() as stack:
        yield lambda limit: stack.enter_context(closing(MemoryCgroup(limit)))


def read(path, how="read", prefix=lambda *argv: argv):
    found = subprocess.run(
        prefix(sys.executable, "-c", READ, path, how), capture_output=True, text=True, check=False, timeout=60
    )
    return found.stdout.strip() or found.stderr


def worker(daemons):
    return int((daemons.run_dir / "worker.pid").read_text())


def test_a_reader_at_its_limit_reads_files_larger_than_it(mounted, cgroup):
    path, digest = mounted
    group = cgroup(20 * MIB)
    assert read(path, "mmap", group.command) == digest
    assert group.hits() > 0
    assert read(path, "read", group.command) == digest  # from the cache's disk


@pytest.mark.slow
def test_a_worker_lives_within_its_budget_while_others_write_to_its_disk(daemons, mounted, cgroup):
    path, digest = mounted
    group = cgroup(FETCH_MEMORY + BASE)
    group.put(worker(daemons))
    stop = threading.Event()

    def write_back():
        while not stop.is_set():
            command = ["dd", "if=/dev/zero", f"of={daemons.home}/junk", "bs=1M", "count=64", "conv=fdatasync"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)

    writer = threading.Thread(target=write_back)
    writer.start()
    try:
        first = worker(daemons)
        assert read(path) == digest
        assert read(path, "mmap") == digest
    finally:
        stop.set()
        writer.join()
    assert worker(daemons) == first
    assert daemons.json("status")["packfs"]["restarts"] == 0


def test_daemons_are_locked_and_killed_last_and_a_killed_worker_is_replaced(daemons, mounted, cgroup):
    path, digest = mounted
    for pid in (daemons.packfs.pid, worker(daemons), daemons.snapshotter.pid):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        assert next(int(line.split()[1]) for line in lines if line.startswith("VmLck:")) > 0
        if may_be_spared():
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-999\n"
    first, killed = worker(daemons), process.oom_kills()
    group = cgroup(BASE)
    group.put(first)
    group.limit(group.usage() + 4 * MIB)  # what it had before is charged to others
    assert read(path) == digest
    wait_until(lambda: worker(daemons) != first)
    assert process.oom_kills() > killed
    status = daemons.json("status")["packfs"]
    assert (status["restarts"], status["poisonous_requests"]) == (1, 0)
    assert "workers that ended: 1" in daemons.floe("status").stdout


def may_be_spared():
    """Whether this process may lower its oom_score_adj, as a root without CAP_SYS_RESOURCE may not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return bool(next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")) >> 24 & 1)
