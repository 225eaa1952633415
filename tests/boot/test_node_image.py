"""A disk image with Floe in it, as it is baked on a machine that runs: its first boot, on two disks that become one; then a newer Floe.

The tests follow each other, on one machine: run all of them.
"""

import json

import pytest
from boot.machine import LONG
from boot.node import CONFIG, LAZY, STORE, expected

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LONG)]
WHEELS = ("--yes", "--json", "--offline", "/srv/wheels")
UNITS = ("floe-node", "floe-packfs", "floe-snapshotter")
CACHE, NEWER = "/mnt/floe-cache-0", "/var/tmp/newer"


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(("one", b""), ("two", b""))


@pytest.fixture(scope="module")
def state():
    return {}


def check_array(node):
    """The cache lies on one file system over both disks."""
    device = node.sh(f"findmnt -no SOURCE {CACHE}").strip()
    whole, *below = (line.split() for line in node.sh("lsblk --inverse -nro NAME,TYPE $1", device).splitlines())
    assert whole[1] == "raid0"
    names = node.sh("readlink -f $1 $2 | xargs basename -a", *(disk.name for disk in node.disks)).split()
    assert sorted(name for name, _ in below) == sorted(names)
    assert node.sh(f"findmnt -no LABEL {CACHE}").strip() == "floe-cache-0"
    assert [one["path"] for one in node.status()["cache"]["directories"]] == [f"{CACHE}/cache"]


def test_an_image_starts_nothing_and_touches_no_disk(node):
    containerd = node.show("containerd", "MainPID")
    flags = (
        "--image",
        "--store",
        f"file://{STORE}",
        "--disks",
        "auto",
        "--raid0",
        "--format",
        "--set",
        "prepare_timeout=60",
    )
    report = json.loads(node.bootstrap(*WHEELS, *flags).stdout)
    assert report["exit_status"] == 0
    assert "disks are chosen at each boot" in report["notes"]
    assert {node.show(unit, "ActiveState") for unit in UNITS} == {"inactive"}
    assert {node.show(unit, "UnitFileState") for unit in UNITS} == {"enabled"}
    assert node.show("containerd", "MainPID") == containerd
    assert 'snapshotter = "floe"' in node.read(CONFIG)
    assert [node.sh("blkid $1 || true", disk.name) for disk in node.disks] == ["", ""]


def test_its_first_boot_makes_a_cache_of_both_disks(node, state):
    node.reboot()
    assert node.sh("systemctl --failed --plain --no-legend") == ""
    assert {node.show(unit, "ActiveState") for unit in UNITS} == {"active"}
    check_array(node)
    cri = state["cri"] = node.cri()
    cri.pull(LAZY)
    assert len(node.status()["mounts"]) == 2
    container = state["container"] = cri.run_container(cri.run_pod("first"), LAZY)
    assert cri.digests(container, range(4)) == expected(range(4))


def test_a_newer_floe_takes_over_under_a_container(node, state):
    cri, container = state["cri"], state["container"]
    process, before = node.process_of(container), node.sh("readlink -f /opt/floe/current").strip()
    node.sh(
        f"cp -r /srv/checkout {NEWER}; sed -i 's/^__version__ = .*/__version__ = \"9.9.9\"/' {NEWER}/floe/__init__.py"
    )
    report = json.loads(node.bootstrap(*WHEELS, program=[f"{NEWER}/install/bootstrap-node.sh"]).stdout)
    assert report["exit_status"] == 0
    assert "replaced the running daemons" in report["done"]
    assert node.run("floe", "version").stdout.split()[-1] == "9.9.9"
    current = node.sh("readlink -f /opt/floe/current").strip()
    for name in ("keeper", "worker"):
        assert current in node.sh(f"tr '\\0' ' ' </proc/$(cat /run/floe/{name}.pid)/cmdline")
    assert node.sh("ls -d $1 || true", before) == ""
    assert node.process_of(container) == process
    assert cri.digests(container, range(4, 8)) == expected(range(4, 8))
    check_array(node)


def test_the_array_is_there_again_after_a_reboot(node, state):
    node.reboot()
    assert node.sh("systemctl --failed --plain --no-legend") == ""
    check_array(node)
    cri = state["cri"] = node.cri()
    container = cri.run_container(cri.run_pod("second"), LAZY)
    assert cri.digests(container, range(10)) == expected(range(10))
    again = json.loads(node.bootstrap(*WHEELS, program=[f"{NEWER}/install/bootstrap-node.sh"]).stdout)
    assert again["done"] == []


def test_an_uninstall_makes_two_empty_disks_of_it(node, state):
    state["cri"].drain()
    report = json.loads(node.bootstrap("--uninstall", "--yes", "--json").stdout)
    assert report["exit_status"] == 0
    assert node.read(CONFIG) == node.before
    assert node.everything() == node.at_first
    assert [
        node.sh("blkid $1 || true; head -c 100000000 $1 | tr -d '\\0' | wc -c", disk.name) for disk in node.disks
    ] == ["0\n"] * 2
    assert "raid0" not in node.read("/proc/mdstat").partition("\n")[2]
