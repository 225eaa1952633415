"""What the machines that boot share: a registry and a store with images, a disk with this checkout and the wheels it needs."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from boot.machine import IMAGE, Disk
from boot.node import BootedNode, lazy_files
from support import sweep
from support.blobhost import BlobHost
from support.floe_node import Node
from support.images import build_oci, busybox, files
from support.wheelhouse import wheelhouse

ROOT = Path(__file__).resolve().parents[2]
# Of the checkout: what bootstrap-node.sh is, and what it installs.
_CHECKOUT = ("install", "floe", "fuse", "snapshotter", "protos", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def place():
    if not (IMAGE / "root.img").exists() or shutil.which("qemu-system-x86_64") is None:
        pytest.skip("there is no machine to boot: sudo install/setup.sh boot makes one")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the wheels are those of this Python, and the machine's is 3.11")
    return sweep.folder("boot", Path("/var/tmp"))


@pytest.fixture(scope="session")
def registry(place):
    host = BlobHost()
    # The first process of a container ends at SIGTERM only if it says so; a shutdown would wait for it for 90 seconds.
    waits = ["sh", "-c", "trap 'exit 0' TERM; sleep 100d & wait"]
    host.add(build_oci(place / "pause", [busybox()], tag="1", command=waits), "pause")
    layers = [busybox(), files(dict(lazy_files()))]
    host.add(build_oci(place / "lazy", layers, tag="1", command=waits), "lazy")
    yield host
    host.close()


@pytest.fixture(scope="session")
def tests_disk(place, registry):
    """/srv of the machines: checkout, wheels, and a store in which `lazy` is indexed."""
    tree = place / "srv"
    tree.mkdir()
    checkout = tree / "checkout"
    checkout.mkdir()
    for name in _CHECKOUT:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(ROOT / name, checkout / name, ignore=skipped, symlinks=True)
        else:
            shutil.copy2(ROOT / name, checkout / name)
    wheelhouse(tree / "wheels")
    (place / "indexing").mkdir()
    indexing = Node(place / "indexing")
    indexing.floe("image", "index", "--plain-http", f"{registry.address}/lazy:1")
    shutil.copytree(indexing.store, tree / "store")
    image = place / "tests.img"
    subprocess.run(["truncate", "-s", "1G", image], check=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "floe-tests", "-d", tree, image], check=True)
    shutil.rmtree(tree)
    return image


@pytest.fixture(scope="module")
def make_node(place, tests_disk, registry, request):
    """Nodes for one module: `make_node(disk, ...)`, where a disk is (serial, bytes that it begins with)."""
    numbers, made = itertools.count(), []

    def make(*disks):
        folder = place / f"{request.module.__name__.rpartition('.')[2]}-{next(numbers)}"
        folder.mkdir()
        found = []
        for serial, data in disks:
            path = folder / f"{serial}.img"
            path.write_bytes(data)
            os.truncate(path, 10 << 30)
            found.append(Disk(path, serial))
        machine = BootedNode(folder, tests_disk, registry, found)
        machine.disks = found
        made.append(machine)
        return machine

    yield make
    for machine in made:
        machine.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """What a machine's journal said, beside what failed."""
    report = (yield).get_result()
    node = item.funcargs.get("node")
    if report.when == "call" and report.failed and node is not None:
        with contextlib.suppress(Exception):
            units = " ".join(f"-u {unit}" for unit in ("floe-node", "floe-packfs", "floe-snapshotter"))
            said = node.sh(
                f"journalctl -b --no-pager -o short-monotonic {units} | tail -n 80; cat /proc/mounts | tail -n 20"
            )
            report.sections.append(("the machine's journal and mounts", said))
