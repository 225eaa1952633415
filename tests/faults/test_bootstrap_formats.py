"""bootstrap-node.sh and real disks: which it formats, how it mounts them, what a kill leaves to the next run, and what
--uninstall takes away.

A boot is what floe-node.service starts then; the machine is this one, with a root of its own.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from bootstrap.settings import keys_of
from support import disks
from support.disks import MIB, LoopDisk
from support.own_root import OwnRoot

RECORD = "/var/lib/floe/node/record.json"
SETTINGS = "/etc/floe/config.toml"
FIRST = "/mnt/floe-cache-0"
KINDS = [
    (disks.ext4, "holds data (ext4)"),
    (disks.swap, "holds data (swap)"),
    (disks.mbr, "holds data (dos partition table)"),
    (disks.gpt, "holds data (gpt partition table)"),
    (disks.lvm, "holds data (LVM2_member)"),
    (disks.raid, "holds data (linux_raid_member)"),
    (disks.luks, "holds data (crypto_LUKS)"),
    (disks.text, "holds data: it has no file system, and is not all zeros"),
    (disks.text_at_the_end, "holds data: it has no file system, and is not all zeros"),
    (disks.text_in_between, "holds data: it has no file system, and is not all zeros"),
]


@pytest.fixture
def attached():
    """Disks of this test, pulled out at its end, after the root that has them mounted is gone."""
    found = []
    yield found
    for disk in found:
        disk.detach()


@pytest.fixture
def node(tmp_path, attached):
    with OwnRoot(tmp_path) as node:
        node.put_program()
        yield node


@pytest.fixture
def new_disk(tmp_path, attached):
    def make(*options, size=disks.SIZE, file=None):
        disk = LoopDisk(file or tmp_path / f"disk-{len(attached)}", *options, size=size)
        attached.append(disk)
        return disk

    return make


def prepare(node, *words):
    """What makes a disk image: disks wait for the boot."""
    done = node.bootstrap("--yes", "--image", *words)
    assert done.returncode == 0, done.stderr
    return done


def boot(node, code=0, **options):
    done = node.boot(**options)
    assert done.returncode == code, done.stderr
    return done.stderr


def settings(node):
    found = keys_of(node.path(SETTINGS).read_text()) if node.path(SETTINGS).exists() else {}
    return {key: value.strip('"') for key, value in found.items()}


def record(node):
    return json.loads(node.path(RECORD).read_text())


def refused(node, disk, says, *, same=True):
    """Named on a running machine it is refused, with nothing changed, there or, unless a file system is at work, on the disk."""
    if not node.path("/run/systemd").exists():
        node.boots()
    before, content = node.changed(), disk.digest()
    done = node.bootstrap("--yes", "--format", "--disks", disk.device)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert f"error: {disk.device} {says}" in done.stderr
    assert "hint: " in done.stderr
    assert node.changed() == before
    assert disk.digest() == content or not same
    return done.stderr


# which disks


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A machine on which nothing was done yet, and nothing may be."""
    with OwnRoot(tmp_path_factory.mktemp("running")) as node:
        node.boots()
        yield node


@pytest.mark.parametrize(("put", "says"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_disk_with_data_is_refused(running, new_disk, put, says):
    disk = new_disk()
    expected = put(disk)
    assert expected.items() <= disk.probe().items()
    refused(running, disk, says)


@pytest.mark.slow
def test_disks_with_data_at_a_boot(node, new_disk):
    found = [(new_disk(), put, says) for put, says in KINDS]
    for disk, put, _ in found:
        put(disk)
    contents = [disk.digest() for disk, _, _ in found]
    prepare(node, "--format", "--disks", ",".join(disk.device for disk, _, _ in found))
    said = boot(node, code=1)
    for disk, _, says in found:
        assert f"error: {disk.device} {says}" in said
    assert said.count("hint: ") == len(found)
    assert [disk.digest() for disk, _, _ in found] == contents
    assert (node.mounts(), "cache_dir" in settings(node)) == ({}, False)


def test_a_disk_with_partitions(running, new_disk):
    disk = new_disk("--partscan")
    subprocess.run(["addpart", disk.device, "1", "2048", "4096"], check=True)
    refused(running, disk, f"has {disk.device}p1 on it")


@pytest.mark.slow
def test_a_mounted_disk(node, new_disk):
    disk = new_disk()
    disks.ext4(disk)
    node.path("/data").mkdir()
    assert node.run("mount", disk.device, "/data").returncode == 0
    node.write("/data/thesis", "years")
    said = refused(node, disk, "is in use, mounted at /data", same=False)
    assert "blkdiscard" not in said
    assert node.path("/data/thesis").read_text() == "years"


@pytest.mark.slow
def test_a_disk_of_floe_that_is_mounted_elsewhere(node, new_disk):
    disk = new_disk()
    disks.ext4(disk, "floe-cache-0")
    node.path("/data").mkdir()
    assert node.run("mount", disk.device, "/data").returncode == 0
    refused(node, disk, "is in use, mounted at /data", same=False)


def test_an_empty_disk_that_somebody_holds(running, new_disk):
    disk = new_disk()
    fd = os.open(disk.device, os.O_RDONLY | os.O_EXCL)
    try:
        refused(running, disk, "is in use: something has it for itself")
    finally:
        os.close(fd)


def test_a_read_only_disk(running, new_disk):
    refused(running, new_disk("--read-only"), "is read-only")


def test_what_is_no_disk(running):
    for device, says in (("/dev/null", "there is no block device"), ("/dev/loop-none", "there is no block device")):
        done = running.bootstrap("--yes", "--format", "--disks", device)
        assert (done.returncode, f"{says} {device}" in done.stderr) == (1, True)


def test_without_consent_an_empty_disk_stays_empty(node, new_disk):
    disk = new_disk()
    node.boots()
    before = node.changed()
    done = node.bootstrap("--yes", "--disks", disk.device)
    assert done.returncode == 1
    assert f"{disk.device} (0 GB): empty, and would be formatted" in done.stderr
    assert "hint: give --format" in done.stderr
    assert node.changed() == before
    shutil.rmtree(node.path("/run/systemd"))
    prepare(node, "--disks", disk.device)
    assert "there was no --format: it stays so" in boot(node)
    assert disk.is_zeros()
    assert (node.mounts(), "cache_dir" in settings(node)) == ({}, False)


@pytest.mark.slow
def test_a_dry_run_formats_nothing(node, new_disk):
    disk = new_disk()
    node.boots()
    before = node.changed()
    done = node.bootstrap("--dry-run", "--format", "--disks", disk.device)
    assert done.returncode == 0, done.stderr
    assert f"would format {disk.device}, and mount it at {FIRST}" in done.stdout
    assert "would set cache_dir = /mnt/floe-cache-0/cache (follows from the disks)" in done.stdout
    assert f"{disk.device} has 32 MiB, and one pack may have 4 GiB" in done.stdout
    assert (node.changed(), disk.is_zeros()) == (before, True)


# what is made of them


def test_an_empty_disk_becomes_the_cache_and_stays_it(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    assert disk.is_zeros()
    said = boot(node)
    assert f"formatted {disk.device}" in said
    found = disk.probe()
    assert (found["TYPE"], found["LABEL"]) == ("ext4", "floe-cache-0")
    assert node.mounts() == {FIRST: disk.device}
    options = node.run("findmnt", "--noheadings", "--output", "OPTIONS", FIRST).stdout
    assert {"noatime", "nodev", "nosuid"} <= set(options.strip().split(","))
    assert {
        "cache_dir": f"{FIRST}/cache", "cache_size": "95%", "cache_min_free": "3%"
    }.items() <= settings(node).items()  # fmt: skip
    assert node.path(f"{FIRST}/cache").stat().st_mode & 0o7777 == 0o700
    node.write(f"{FIRST}/cache/kept", "yes")
    assert boot(node) == ""  # again, with nothing to do
    node.restart()
    assert boot(node) == f"mounted {disk.device} at {FIRST}\n"
    assert disk.probe()["UUID"] == found["UUID"]
    assert node.path(f"{FIRST}/cache/kept").read_text() == "yes"


@pytest.mark.slow
def test_a_disk_that_is_empty_after_a_stop_of_the_machine_is_formatted_again(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    node.restart()
    disk.detach()
    disk.file.unlink()
    disk.__init__(disk.file)
    prepare(node, "--disks", disk.device)  # a machine's disk has the same name again; a loop device may not
    boot(node)
    assert node.mounts() == {FIRST: disk.device}


@pytest.mark.slow
def test_a_disk_that_is_gone_is_done_without(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    node.restart()
    name = disk.device
    disk.detach()
    assert f"error: there is no block device {name}" in boot(node, code=1) or Path(name).exists()
    assert "cache_dir" not in settings(node)


@pytest.mark.slow
def test_several_disks_are_several_directories_wherever_they_are_plugged_in(node, new_disk):
    one, two = new_disk(), new_disk(size=40 * MIB)
    prepare(node, "--format", "--disks", f"{one.device},{two.device}")
    boot(node)
    assert node.mounts() == {FIRST: one.device, "/mnt/floe-cache-1": two.device}
    found = settings(node)
    assert (found["cache_dir"], found["cache_dirs"]) == (f"{FIRST}/cache", "/mnt/floe-cache-1/cache")
    node.restart()
    names = one.device, two.device
    one.detach()
    two.detach()
    two.attach(device=names[0])
    one.attach(device=names[1])
    boot(node)
    assert node.mounts() == {FIRST: one.device, "/mnt/floe-cache-1": two.device}
    assert settings(node) == found


@pytest.mark.slow
def test_only_what_is_empty_of_several_is_formatted(node, new_disk):
    data, empty = new_disk(), new_disk()
    disks.ext4(data)
    content = data.digest()
    prepare(node, "--format", "--disks", f"{data.device},{empty.device}")
    assert f"error: {data.device} holds data (ext4)" in boot(node, code=1)
    assert node.mounts() == {FIRST: empty.device}
    assert data.digest() == content


@pytest.mark.slow
def test_a_copy_of_a_cache_disk_is_not_mistaken_for_it(node, new_disk, tmp_path):
    one = new_disk()
    prepare(node, "--format", "--disks", one.device)
    boot(node)
    node.restart()
    copy = tmp_path / "copy"
    shutil.copyfile(one.file, copy)
    two = new_disk(file=copy)
    done = node.bootstrap("--yes", "--image", "--disks", f"{one.device},{two.device}")
    assert done.returncode == 0
    said = boot(node, code=1)
    assert f"{one.device}, {two.device} are both called floe-cache-0" in said
    assert "hint: " in said


@pytest.mark.slow
def test_something_else_is_mounted_where_the_cache_goes(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    node.path(FIRST).mkdir()
    assert node.run("mount", "-t", "tmpfs", "others", FIRST).returncode == 0
    assert f"error: {FIRST} has something else mounted" in boot(node, code=1)
    assert not list(node.path(FIRST).iterdir())


KERNEL_HAS_MD = Path("/proc/mdstat").exists() or (
    shutil.which("modprobe") and subprocess.run(["modprobe", "--quiet", "raid0"], check=False).returncode == 0
)


@pytest.mark.skipif(KERNEL_HAS_MD, reason="this kernel has RAID 0")
@pytest.mark.slow
def test_an_array_is_refused_where_the_kernel_has_none(node, new_disk):
    one, two = new_disk(), new_disk()
    node.boots()
    before = node.changed()
    done = node.bootstrap("--yes", "--format", "--raid0", "--disks", f"{one.device},{two.device}")
    assert done.returncode == 1
    assert "has no RAID 0" in done.stderr
    assert "hint: leave --raid0 out" in done.stderr
    assert node.changed() == before


@pytest.mark.skipif(not KERNEL_HAS_MD, reason="this kernel has no RAID 0")
@pytest.mark.skipif(not shutil.which("mdadm"), reason="no mdadm on this machine")
@pytest.mark.slow
def test_an_array(node, new_disk):
    one, two = new_disk(), new_disk()
    prepare(node, "--format", "--raid0", "--disks", f"{one.device},{two.device}")
    boot(node)
    ((place, array),) = node.mounts().items()
    assert (place, array.startswith("/dev/md")) == (FIRST, True)
    assert node.run("lsblk", "--noheadings", "--output", "TYPE", array).stdout.strip() == "raid0"
    node.restart()
    boot(node)
    assert list(node.mounts()) == [FIRST]
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert one.is_zeros()
    assert two.is_zeros()


# killed in between


def cut(node, program, what):
    """The environment in which `program` is a script that kills whoever called it; `what` it does before, in shell."""
    real = shutil.which(program)
    node.write(f"/opt/cut/{program}", f'#!/bin/sh\nset -e\nreal={real}\n{what}\nkill -KILL "$PPID"\n', 0o755)
    return {"PATH": f"/opt/cut:{node.environ['PATH']}"}


CUTS = {
    "before the file system": ("mkfs.ext4", ""),
    "half a file system": ("mkfs.ext4", 'for last; do :; done; dd if=/dev/urandom of="$last" bs=1M count=4 conv=fsync'),
    "after the file system": ("mkfs.ext4", '"$real" "$@"'),
    "before the mount": ("mount", ""),
    "after the mount": ("mount", '"$real" "$@"'),
}


@pytest.mark.parametrize("window", CUTS)
@pytest.mark.slow
def test_killed_a_second_run_finishes(node, new_disk, window):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    done = node.boot(environ=cut(node, *CUTS[window]))
    assert done.returncode == -9, done
    boot(node)
    assert node.mounts() == {FIRST: disk.device}
    assert settings(node)["cache_dir"] == f"{FIRST}/cache"
    found = record(node)
    assert (found["formatting"], len(found["formatted"])) == ([], 1)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert disk.is_zeros()


@pytest.mark.parametrize("window", ["before the file system", "half a file system", "after the file system"])
@pytest.mark.slow
def test_killed_what_others_put_there_meanwhile_is_theirs(node, new_disk, window):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    assert node.boot(environ=cut(node, *CUTS[window])).returncode == -9
    disks.ext4(disk, "mine")
    content = disk.digest()
    assert "holds data (ext4)" in boot(node, code=1)
    assert disk.digest() == content
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert f"{disk.device} was formatted for the cache once, holds something else now" in done.stdout
    assert disk.digest() == content


@pytest.mark.slow
def test_killed_and_finished_a_disk_that_is_others_later_is_not_formatted(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    assert node.boot(environ=cut(node, *CUTS["after the file system"])).returncode == -9
    boot(node)
    node.restart()
    disks.text(disk)
    disk.write(1024, b"\0" * 4096)  # no file system of Floe's any more
    content = disk.digest()
    assert "holds data" in boot(node, code=1)
    assert disk.digest() == content


# --uninstall


def test_uninstall_leaves_the_disk_as_it_was_and_what_is_not_floes(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device, "--store", "file:///var/lib/floe/store")
    boot(node)
    node.write(f"{FIRST}/cache/pack", "cached")
    node.write("/var/lib/floe/store/object", "stored")
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert disk.is_zeros()
    assert node.mounts() == {}
    assert "the store in /var/lib/floe/store is yours, and stays" in done.stdout
    assert node.path("/var/lib/floe/store/object").read_text() == "stored"
    left = [path for path in node.changed() if re.match(r"/(mnt|etc|opt|usr|run)/.*floe|/opt/floe/node", path)]
    assert [path for path in left if not path.startswith("/opt/floe")] == []


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.slow
def test_uninstall_leaves_what_others_put_beside_the_cache(node, new_disk, mounted):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    node.write(f"{FIRST}/cache/pack", "cached")
    node.write(f"{FIRST}/mine/thesis", "years")
    if not mounted:
        node.restart()
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert f"{disk.device} has more on it than the cache, mine, and stays" in done.stdout
    node.path("/look").mkdir()
    assert node.run("mount", disk.device, "/look").returncode == 0
    assert node.path("/look/mine/thesis").read_text() == "years"
    assert not node.path("/look/cache").exists()


@pytest.mark.slow
def test_uninstall_leaves_a_disk_that_is_somebody_elses_now(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    node.restart()
    disks.ext4(disk, "mine")
    content = disk.digest()
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert "holds something else now, and stays as it is" in done.stdout
    assert disk.digest() == content


@pytest.mark.slow
def test_uninstall_leaves_a_cache_that_was_there_before(node):
    node.write("/var/cache/floe/older", "theirs")
    prepare(node, "--disks", "none")
    boot(node)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert node.path("/var/cache/floe/older").read_text() == "theirs"


@pytest.mark.slow
def test_uninstall_killed_while_it_empties_a_disk_goes_on(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    what = 'for last; do :; done; dd if=/dev/zero of="$last" bs=64k count=1 conv=fsync'
    done = node.bootstrap("--yes", "--uninstall", environ=cut(node, "blkdiscard", what))
    assert done.returncode == -9
    assert not disk.is_zeros()
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert disk.is_zeros()
    assert not node.path(RECORD).exists()


@pytest.mark.slow  # it is tried for ten seconds
def test_uninstall_waits_for_who_uses_the_cache_and_says_so(node, new_disk):
    disk = new_disk()
    prepare(node, "--format", "--disks", disk.device)
    boot(node)
    user = subprocess.Popen(node.command("sh", "-c", f"cd {FIRST}/cache && exec sleep 100"), env=node.environ)
    try:
        until = time.monotonic() + 20
        while Path(f"/proc/{user.pid}/cwd").readlink().name != "cache" and time.monotonic() < until:
            time.sleep(0.05)
        done = node.bootstrap("--yes", "--uninstall")
        assert done.returncode == 1
        assert f"error: {FIRST} cannot be unmounted: something uses it" in done.stderr
        assert "hint: fuser" in done.stderr
    finally:
        user.kill()
        user.wait()
    assert node.bootstrap("--yes", "--uninstall").returncode == 0
    assert disk.is_zeros()
