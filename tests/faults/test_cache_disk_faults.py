"""The node cache on real disks that are full, out of inodes, read-only, or gone from under it: no read fails, and it is said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.floe_node import Node, wait_until
from support.packs import make_pack, random_content
from support.reading import read

from floe.fuse.pack_reader import PackReader
from floe.store.cache import CacheWriter, NodeCache, open_cache, open_writer
from floe.store.objects.memory import MemoryStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
MIB = 1 << 20
FRAME = 128 << 10


@pytest.fixture
def disk(tmp_path):
    """An ext4 of 24 MiB and 64 inodes on a loop device."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-N", "64", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)], check=True)
    yield folder
    # A thread may still be about to close what it read, or tell of the disk.
    wait_until(lambda: subprocess.run(["umount", str(folder)], check=False).returncode == 0, seconds=60)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "ballast").open("wb") as file:
        while True:
            file.write(bytes(MIB))
            file.flush()


def take_inodes(folder):
    with contextlib.suppress(OSError):
        for number in range(1000):
            (folder / f"inode-{number}").touch()


def fail(folder):
    """As ext4 does it when its disk fails: read-only from now on, whoever has files open."""
    device = next(line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if f" {folder} " in line)
    Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")


def remove(folder):
    def gone():  # the writer may still make a file where everything was just removed
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return not (folder / "cache").exists()

    wait_until(gone)


WRONG = {"full": fill, "no inodes": take_inodes, "read-only": fail, "removed": remove}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_reads_go_on(disk, wrong):
    memory = MemoryStore()
    packs = [make_pack(random_content(2 * MIB, 90 + n), FRAME).publish(memory) for n in range(3)]
    cache = NodeCache(disk / "cache")
    for pack in packs:
        cache.add_index(pack.id, pack.index.encode())
    with (
        contextlib.closing(CacheWriter(cache)) as writer,
        contextlib.closing(PackReader(memory, writer, readahead=0)) as reader,
    ):
        assert read(reader, packs[0].id, 0, 2 * MIB) == packs[0].content
        wait_until(lambda: reader.counters()["memory_bytes"] == 0)
        assert read(reader, packs[1].id, 0, FRAME) == packs[1].content[:FRAME]
        wrong(disk)
        for (
            pack
        ) in packs:  # in the cache, half in the cache, never opened: when its index is gone, too, the store has it
            assert read(reader, pack.id, 0, 2 * MIB) == pack.content
        assert reader.counters()["failed_reads"] == 0


def test_what_is_said_of_a_failing_disk_keeps_none_of_its_files_open(disk, caplog):
    memory = MemoryStore()
    pack = make_pack(random_content(2 * MIB, 94), FRAME).publish(memory)
    cache = NodeCache(disk / "cache")
    cache.add_index(pack.id, pack.index.encode())
    with contextlib.closing(CacheWriter(cache)) as writer:
        with contextlib.closing(PackReader(memory, writer, readahead=0)) as reader:
            assert read(reader, pack.id, 0, FRAME) == pack.content[:FRAME]
            wait_until(lambda: reader.counters()["memory_bytes"] == 0)
        cached = writer.pack(pack.id)
        cached.open()
        fail(disk)
        cached.distrust("another boot")
    # Whoever keeps log records keeps what was logged: an exception would keep the files its functions had open.
    assert any("cannot be written" in record.getMessage() for record in caplog.records)
    subprocess.run(["umount", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk.with_suffix(".img")), str(disk)], check=True)


@pytest.mark.parametrize("several", [False, True])
def test_a_worker_that_starts_on_read_only_disks_alone_reads_from_the_store(disk, several):
    memory = MemoryStore()
    known, unknown = (make_pack(random_content(2 * MIB, 95 + n), FRAME).publish(memory) for n in range(2))
    roots = [disk / "cache", disk / "more"][: 1 + several]
    cache = open_cache(roots)
    cache.add_index(known.id, known.index.encode())
    open_writer(cache).close()
    fail(disk)
    with (
        contextlib.closing(open_writer(open_cache(roots))) as writer,
        contextlib.closing(PackReader(memory, writer, readahead=0)) as reader,
    ):
        for pack in (known, unknown):
            assert read(reader, pack.id, 0, 2 * MIB) == pack.content
        assert reader.counters()["kept_held_bytes"] == 0
        assert [disk["state"] for disk in writer.disks()] == ["left out"] * len(roots)
        assert not writer.room().is_plenty


@pytest.fixture
def node(tmp_path, disk):
    """A mounted model of two files, its cache on `disk`."""
    (tmp_path / "home").mkdir()
    made = Node(tmp_path / "home")
    made.environ |= {"FLOE_CACHE_DIR": str(disk / "cache"), "FLOE_SPOOL_DIR": str(tmp_path / "spool")}
    made.environ |= {"FLOE_CACHE_MIN_FREE": "0", "FLOE_READAHEAD": "0"}
    (tmp_path / "m").mkdir()
    made.content = {name: random_content(4 * MIB, number) for number, name in enumerate(("one", "two", "three"))}
    for name, content in made.content.items():
        (tmp_path / "m" / name).write_bytes(content)
    made.floe("model", "push", tmp_path / "m", "m")
    made.place = tmp_path / "mnt"
    made.place.mkdir()
    made.floe("model", "mount", "m", made.place)
    yield made
    made.clean_up()


def test_a_mounted_model_reads_on_and_status_says_why_nothing_is_kept(node, disk):
    assert (node.place / "one").read_bytes() == node.content["one"]
    assert node.json("status")["cache"]["directories"][0]["disk_problem"] == ""
    fail(disk)
    for name in ("one", "two", "three"):
        assert (node.place / name).read_bytes() == node.content[name]
    # Not that it is read-only: since Linux 6.15 such a disk does not say so to statvfs.
    wait_until(lambda: "since the worker's start; nobody's read failed" in node.floe("status").stdout)
    node.floe("umount", node.place)
    wait_until(lambda: not node.processes())


def test_a_worker_that_finds_no_cache_directory_at_its_start_reads_from_the_store(node, disk):
    assert (node.place / "one").read_bytes() == node.content["one"]
    (disk / "cache").rename(disk / "lost")
    (disk / "cache").touch()
    (worker,) = [pid for pid, words in node.processes() if {"--worker", "floe.fuse.keeper"} & {*words} == {"--worker"}]
    os.kill(worker, signal.SIGKILL)
    for name in ("two", "three"):
        assert (node.place / name).read_bytes() == node.content[name]

    def said():  # by the worker, once it has the time
        (directory,) = node.json("status")["cache"]["directories"]
        return (
            directory.get("state") == "left out" and f"cache folder {disk}/cache: File exists" in directory["problem"]
        )

    wait_until(said)
    (disk / "cache").unlink()
    (disk / "lost").rename(disk / "cache")
    node.floe("umount", node.place)
    wait_until(lambda: not node.processes())
