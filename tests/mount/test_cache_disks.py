"""Cache directories on disks of their own, and one on a disk that is slower than the store."""

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.floe_node import Node, wait_until
from support.slow_disk import device_of, drop_page_cache, ext4_disk, slow_disk

from floe.store.exposition import read_metrics

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20


@pytest.fixture
def stack():
    with ExitStack() as made:
        yield made


@pytest.fixture
def node(tmp_path, stack):
    """Its disks are taken away after it."""
    (tmp_path / "node").mkdir()
    node = Node(tmp_path / "node")
    node.environ["FLOE_PROFILES"] = "off"
    stack.callback(node.clean_up)
    return node


def push(node, name, size):
    folder = node.home / name
    folder.mkdir()
    content = random.Random(name).randbytes(size)
    (folder / "weights").write_bytes(content)
    node.floe("model", "push", folder, name)
    return content


def metrics(node):
    return read_metrics(f"unix:{node.run_dir}/packfs-metrics.sock")


@pytest.mark.slow
def test_two_disks_hold_a_cache_together_and_mount_natively_from_both(node, tmp_path, stack):
    disks = [stack.enter_context(ext4_disk(tmp_path / name)) / "cache" for name in ("one", "two")]
    stack.callback(node.clean_up)
    node.environ |= {"FLOE_CACHE_DIR": str(disks[0]), "FLOE_CACHE_DIRS": str(disks[1])}
    models, places = {}, {}  # contents, and by disk a model
    while len(places) < 2:
        name = f"m{len(models)}"
        models[name] = push(node, name, MIB)
        assert not node.json("model", "mount", name, node.home / f"mnt-{name}")["resident"]
        assert (node.home / f"mnt-{name}" / "weights").read_bytes() == models[name]
        wait_until(lambda: node.json("status")["cache"]["complete_packs"] == len(models))
        for directory in node.json("status")["cache"]["directories"]:
            if directory["complete_packs"]:
                places.setdefault(directory["path"], name)
    cache = node.json("status")["cache"]
    assert [directory["path"] for directory in cache["directories"]] == list(map(str, disks))
    assert {directory["state"] for directory in cache["directories"]} == {"ok"}
    text = node.floe("status").stdout
    assert all(f"{disk}: " in text for disk in disks)
    for name in models:
        node.floe("umount", node.home / f"mnt-{name}")

    mountpoint = node.home / "mnt"
    for name in places.values():
        assert node.json("model", "mount", name, mountpoint)["resident"]
        (mount,) = node.json("status")["mounts"]
        assert mount["mode"] == "native"
        assert (mountpoint / "weights").read_bytes() == models[name]
        node.floe("umount", mountpoint)

    elsewhere = places[str(disks[1])]
    node.environ["FLOE_CACHE_DIRS"] = "none"
    assert not node.json("model", "mount", elsewhere, mountpoint)["resident"]
    assert (mountpoint / "weights").read_bytes() == models[elsewhere]
    node.floe("umount", mountpoint)
    node.environ["FLOE_CACHE_DIRS"] = str(disks[1])
    assert node.json("model", "mount", elsewhere, mountpoint)["resident"]
    node.floe("umount", mountpoint)


def test_a_disk_that_fails_while_a_model_is_read_costs_no_read(node, tmp_path, stack):
    disks = [stack.enter_context(ext4_disk(tmp_path / name)) for name in ("one", "two")]
    stack.callback(node.clean_up)
    node.environ |= {
        "FLOE_CACHE_DIR": f"{disks[0]}/cache",
        "FLOE_CACHE_DIRS": f"{disks[1]}/cache",
        "FLOE_READAHEAD": "0",
    }
    content = push(node, "m", 4 * MIB)
    mountpoint = node.home / "mnt"
    node.floe("model", "mount", "m", mountpoint)
    fd = os.open(mountpoint / "weights", os.O_RDONLY)
    stack.callback(os.close, fd)
    assert os.pread(fd, 4096, 0) == content[:4096]
    wait_until(lambda: any(d["held_bytes"] for d in node.json("status")["cache"]["directories"]))
    (used,) = (d["path"] for d in node.json("status")["cache"]["directories"] if d["held_bytes"])
    (Path("/sys/fs/ext4") / device_of(Path(used).parent).name / "trigger_fs_error").write_text("a test")
    for offset in range(0, 4 * MIB, 64 << 10):
        assert os.pread(fd, 4096, offset) == content[offset : offset + 4096]

    def state():
        found = {d["path"]: d["state"] for d in node.json("status")["cache"]["directories"]}
        return found.pop(used), *found.values()

    wait_until(lambda: state() == ("left out", "ok"))
    assert "LEFT OUT Read-only file system" in node.floe("status").stdout
    assert "its packs are read from the store" in (node.run_dir / "packfs.log").read_text()
    assert 'state="left out"} 1' in metrics(node)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 4 * MIB, 0) == content


def test_a_cache_disk_slower_than_the_store_is_gone_around_but_for_when_the_store_is_away(node, tmp_path, stack):
    disk = stack.enter_context(slow_disk(tmp_path / "slow"))
    stack.callback(node.clean_up)
    node.environ |= {"FLOE_CACHE_DIR": str(disk.path / "cache"), "FLOE_READAHEAD": "0"}
    content = push(node, "m", 16 * MIB)
    mountpoint = node.home / "mnt"
    node.floe("model", "mount", "m", mountpoint)
    held = 12 * MIB  # not all of it: a complete pack would be mounted natively, which nothing goes around
    fd = os.open(mountpoint / "weights", os.O_RDONLY)
    stack.callback(os.close, fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    offsets = range(0, held, 256 << 10)

    def read_all():
        drop_page_cache(disk.path / "cache")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for offset in offsets:
            assert os.pread(fd, 4096, offset) == content[offset : offset + 4096]

    def judged():
        (directory,) = node.json("status")["cache"]["directories"]
        return directory["bypass"]

    read_all()
    wait_until(lambda: node.json("status")["packfs"]["counters"]["kept_held_bytes"] >= held)
    disk.set(0.05)
    wait_until(lambda: (read_all(), judged()["bypassed"])[1])
    assert judged()["slow"]
    text = node.floe("status").stdout
    assert "A HIT COSTS MORE THAN A MISS" in text
    assert "reads go around it" in text
    log = (node.run_dir / "packfs.log").read_text()
    assert log.count("A HIT COSTS MORE THAN A MISS") == 1
    assert 'floe_cache_directory_bypassed{directory="' in metrics(node)

    node.store.rename(node.home / "away")
    for _ in range(2):
        read_all()  # from the disk, then
    (node.home / "away").rename(node.store)
    read_all()
    counters = node.json("status")["packfs"]["counters"]
    assert counters["around_reads"] > counters["around_returned"] > 0
    assert counters["failed_reads"] == 0
