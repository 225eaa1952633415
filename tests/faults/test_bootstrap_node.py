"""install/bootstrap where a step fails, is interrupted, or finds what others have done meanwhile."""

import json
import signal
import sys
from pathlib import Path

import pytest
from bootstrap.survey import mark, survey
from support.own_root import OwnRoot

RECORD = "/var/lib/floe/node/record.json"
CONTAINERD = "/etc/containerd/config.toml"
# Answers as systemd does for a node that runs; $did: what it was asked to do, a line each.
SYSTEMCTL = """#!/bin/sh
did=/opt/fake/did
case "$*" in
"show --property KillMode"*) echo process; exit ;;
"show --property ActiveState --value containerd.service") echo active; exit ;;
"show --property LoadState"*) echo loaded; exit ;;
"show --property ActiveState"*) grep -qx "start .*${5%.service}.*" "$did" && echo active || echo inactive; exit ;;
is-enabled*) exit ;;
show*) exit ;;
esac
echo "$*" >>"$did"
"""


@pytest.fixture
def node(tmp_path):
    """A machine for which Floe was prepared as for a disk image, and which systemd seems to run."""
    with OwnRoot(tmp_path) as node:
        node.program = f"/opt/floe/versions/{node.put_program()}/bin/floe"
        node.environ["PATH"] = f"/opt/fake:{node.environ['PATH']}"
        systemd(node)
        done = node.bootstrap("--yes", "--image", "--disks", "none", "--store", "file:///srv/store")
        assert done.returncode == 0, done.stderr
        node.boots()
        yield node


def systemd(node, *more):
    """A systemctl that is made up; `more`: lines for what it was asked to do."""
    node.write("/opt/fake/systemctl", SYSTEMCTL + "\n".join(more) + "\n", 0o755)
    node.write("/opt/fake/did", "")


def did(node):
    return node.path("/opt/fake/did").read_text().splitlines()


def record(node):
    return json.loads(node.path(RECORD).read_text())


def text(node, name):
    path: Path = node.path(name)
    return path.read_text() if path.exists() else ""


def test_that_formatting_was_begun_counts_until_the_next_boot():
    assert survey([], [mark("one"), "two@another-boot", "three"]).being_formatted == {"one"}


# uninstall


def test_uninstall_is_refused_while_something_puts_floe_back(node):
    drop_in = "/etc/systemd/system/containerd.service.d/50-floe.conf"
    node.write(drop_in, "[Service]\nExecStartPre=-/usr/local/bin/floe containerd configure\n")
    before = node.changed()
    done = node.bootstrap("--yes", "--uninstall")
    assert (done.returncode, drop_in in done.stderr, "extras.sh remove /" in done.stderr) == (1, True, True)
    assert node.changed() == before
    # systemd goes by it until its units are read anew.
    node.path(drop_in).unlink()
    systemd(node, 'case "$*" in "restart containerd.service") /usr/local/bin/floe containerd configure ;; esac')
    done = node.bootstrap("--yes", "--uninstall")
    assert (done.returncode, "has Floe again" in done.stderr) == (1, True), done.stderr
    assert did(node) == ["restart containerd.service"]  # and nothing was stopped
    assert "floe" in text(node, CONTAINERD)
    systemd(node)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert "restart containerd.service" in did(node)
    assert not node.path(CONTAINERD).exists()
    assert not node.path(RECORD).exists()


def test_an_uninstall_that_was_killed_after_it_took_floe_out_restarts_containerd_when_it_goes_on(node):
    program = text(node, node.program)
    floe = f"{Path(sys.executable).parent}/floe"
    killed = f'case "$*" in *dry-run*|*status*) ;; *unconfigure*) {floe} "$@"; kill -9 $PPID ;; esac'
    node.write(node.program, program.replace("exec", f"{killed}\nexec"), 0o755)
    assert node.bootstrap("--yes", "--uninstall").returncode == -signal.SIGKILL
    assert (node.path(CONTAINERD).exists(), did(node)) == (False, [])
    node.write(node.program, program, 0o755)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert did(node)[0] == "restart containerd.service"
