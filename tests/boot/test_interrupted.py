"""A bootstrap killed in the middle, with all that it had started: the next run finishes the work."""

import json

import pytest
from boot.node import BOOTSTRAP, CONFIG, LAZY, STORE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FLAGS = (
    "--yes", "--offline", "/srv/wheels", "--store", f"file://{STORE}", "--format", "--verify-image", LAZY, "--json",
)  # fmt: skip
_VERSIONS = "/opt/floe/versions"
# What has just happened when everything is killed: a shell's word for it.
PLACES = {
    "packages are unpacked": f"ls {_VERSIONS}/*/lib/python3*/site-packages/botocore && ! ls {_VERSIONS}/*/complete",
    "the disk is being formatted": "pidof mkfs.ext4",
    "the disk is mounted": "mountpoint -q /mnt/floe-cache-0",
    "the units are being enabled": "test -e /etc/systemd/system/multi-user.target.wants/floe-packfs.service",
    "containerd is configured": f"grep -q proxy_plugins.floe {CONFIG}",
    "the daemons start": "systemctl is-active floe-packfs",
}
_KILLED, _ENDED = 0, 3
_SCRIPT = f"""
seen=$1; shift
setsid {BOOTSTRAP} "$@" >/var/log/bootstrap 2>&1 &
while ! eval "$seen" >/dev/null 2>&1; do kill -0 $! 2>/dev/null || exit {_ENDED}; sleep 0.05; done
kill -9 -$!
wait $! || true
"""


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(("empty", b""))


def test_the_next_run_finishes_what_was_killed_again_and_again(node):
    for place, seen in PLACES.items():
        done = node.run("/bin/sh", "-c", _SCRIPT, "sh", seen, *FLAGS, check=False, seconds=900)
        assert done.returncode == _KILLED, f"{place}: {node.read('/var/log/bootstrap')}"
    report = json.loads(node.bootstrap(*FLAGS).stdout)
    assert report["exit_status"] == 0
    assert any("it runs" in line for line in report["done"])
    assert node.sh("ls /opt/floe/versions | wc -l").strip() == "1"
    assert node.sh("systemctl --failed --plain --no-legend") == ""
    again = json.loads(node.bootstrap("--yes", "--offline", "/srv/wheels", "--json").stdout)
    assert again["done"] == []


def test_an_uninstall_killed_again_and_again_is_finished_by_the_next_one(node):
    for seen in (
        f"! grep -q floe {CONFIG}",
        "! systemctl is-active floe-snapshotter",
        "! test -e /etc/systemd/system/floe-packfs.service",
        "! test -e /etc/floe",
    ):
        node.run("/bin/sh", "-c", _SCRIPT, "sh", seen, "--uninstall", "--yes", check=False, seconds=300)
    node.bootstrap("--uninstall", "--yes")
    assert node.read(CONFIG) == node.before
    assert node.everything() == node.at_first
    assert node.sh("blkid $1 || true", node.disks[0].name) == ""
