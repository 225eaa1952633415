"""bootstrap-node.sh killed at each of its steps: a second run ends where one that was not killed does.

A step is a system call that makes something durable or visible; strace kills the program right after it.
"""

import re
import shutil

import pytest
from support.disks import LoopDisk
from support.own_root import SCRIPT, OwnRoot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes: a machine for each step

RECORD = "/var/lib/floe/node/record.json"
BOOT = ("/opt/floe/current/bin/python", "-I", "-B", "/opt/floe/node/bootstrap", "--boot")
UNINSTALL = (SCRIPT, "--yes", "--uninstall")
# What changes from one run to another, and means nothing.
_UNLIKE = re.compile(r"/run/|/tmp|/var/tmp|/var/lib/floe/node/record\.json|/root/")


def tree(node):
    """All that was written, with content; of directories that they are there."""
    found = {}
    for name in node.changed():
        if not _UNLIKE.match(name) and not name.startswith(str(node.scratch)):
            path = node.path(name)
            found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def killed(node, calls, number, *words):
    """Run a command that is killed after the `number`th of these system calls of its own; whether it came to that."""
    options = ("-qq", "-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={number}")
    strace = shutil.which("strace")
    done = node.run(strace, *options, "-o", "/dev/null", *words)
    assert done.returncode in (0, -9, 137), done
    return done.returncode != 0


@pytest.fixture
def machines(tmp_path):
    """Makes machines with an empty disk each; all are gone at the end."""
    made = []

    def make():
        for node, disk in made:
            node.close()
            disk.detach()
            shutil.rmtree(node.scratch)
        made.clear()
        scratch = tmp_path / "machine"
        scratch.mkdir()
        disk = LoopDisk(scratch / "disk")
        node = OwnRoot(scratch)
        made.append((node, disk))
        node.put_program()
        return node, disk

    yield make
    for node, disk in made:
        node.close()
        disk.detach()


def image(disk):
    return (SCRIPT, "--yes", "--image", "--store", "s3://bucket/x", "--disks", disk.device, "--format")


def run(node, *words):
    done = node.run(*words)
    assert done.returncode == 0, done.stderr
    return done


def test_while_a_disk_image_is_made(machines):
    node, disk = machines()
    run(node, *image(disk))
    whole = tree(node)
    for number in range(1, 200):
        node, disk = machines()
        if not killed(node, "fsync,symlink", number, *image(disk)):
            break
        run(node, *image(disk))
        assert tree(node) == whole, number
        run(node, *UNINSTALL)
        assert not [name for name in tree(node) if "floe" in name and not name.startswith("/opt/floe")], number
    assert 20 < number < 199


def test_while_it_boots(machines):
    node, disk = machines()
    run(node, *image(disk))
    run(node, *BOOT)
    whole = tree(node)
    for number in range(1, 100):
        node, disk = machines()
        run(node, *image(disk))
        if not killed(node, "fsync,mkdir", number, *BOOT):
            break
        run(node, *BOOT)
        assert tree(node) == whole, number
        assert node.mounts() == {"/mnt/floe-cache-0": disk.device}
    assert 5 < number < 99


def test_while_it_is_uninstalled(machines):
    node, disk = machines()
    run(node, *image(disk))
    run(node, *BOOT)
    run(node, *UNINSTALL)
    whole = tree(node)
    assert not [name for name in whole if "floe" in name and not name.startswith("/opt/floe")]
    for number in range(1, 200):
        node, disk = machines()
        run(node, *image(disk))
        run(node, *BOOT)
        if not killed(node, "fsync,unlink,rmdir", number, *UNINSTALL):
            break
        run(node, *UNINSTALL)
        assert tree(node) == whole, number
        assert disk.is_zeros()
        assert node.mounts() == {}
    assert 20 < number < 199
