"""A node from its first bootstrap to its uninstall, on a machine that boots. The tests follow each other: run all of them."""

import json

import pytest
from boot.node import CONFIG, LAZY, STORE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FLAGS = (
    "--yes", "--offline", "/srv/wheels", "--store", f"file://{STORE}", "--set", "completion=off",
    "--format", "--verify-image", LAZY, "--json",
)  # fmt: skip
DAEMONS = ("floe-packfs", "floe-snapshotter")
UNITS = ("floe-node", *DAEMONS)


@pytest.fixture(scope="module")
def node(make_node):
    """With an empty disk, and one that somebody's data begin on."""
    return make_node(("empty", b""), ("used", b"somebody's data"))


@pytest.fixture(scope="module")
def state(node):
    return {}


def files_of(node):
    """All that a run may change, by what is in it and when it was written."""
    return node.sh(
        "find /etc /opt /usr/local /var/lib/floe/node -xdev -type f -printf '%p %T@ %i\\n' | sort;"
        "findmnt -rn -t ext4; blkid | sort"
    )


def test_a_disk_that_holds_data_is_refused_and_nothing_is_changed(node):
    before = files_of(node)
    disk = node.disks[1]
    done = node.bootstrap(*FLAGS, "--disks", disk.name, check=False)
    assert done.returncode == 1
    assert f"error: {disk.name} holds data" in done.stderr
    assert files_of(node) == before
    assert node.sh("head -c 15 $1", disk.name) == "somebody's data"


def test_an_empty_disk_is_not_formatted_without_a_yes(node):
    before = files_of(node)
    done = node.bootstrap(*[flag for flag in FLAGS if flag != "--format"], check=False)
    assert done.returncode == 1
    assert "empty, and would be formatted" in done.stderr
    assert files_of(node) == before


def test_one_command_makes_a_node(node, state):
    report = json.loads(node.bootstrap(*FLAGS).stdout)
    assert report["exit_status"] == 0
    for unit in DAEMONS:
        assert node.show(unit, "ActiveState") == "active"
        assert node.show(unit, "UnitFileState") == "enabled"
    assert any("used" in note or "nvme1n1 holds data" in note for note in report["notes"])
    assert any(line.startswith(f"{LAZY}: pulled in") and "it runs" in line for line in report["done"])
    assert node.sh("findmnt -no SOURCE /mnt/floe-cache-0 | xargs basename") == node.sh(
        "readlink -f $1 | xargs basename", node.disks[0].name
    )
    assert node.sh("head -c 15 $1", node.disks[1].name) == "somebody's data"
    assert 'snapshotter = "floe"' in node.read(CONFIG)
    state["report"] = report
