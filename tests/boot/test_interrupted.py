"""A bootstrap killed in the middle, with all that it had started: the next run finishes the work.

Nothing is polled for: at each place there is something of the test's that the bootstrap itself comes upon. A program in
front of the machine's own, first in PATH, ends all; or a wheel is a FIFO, which pip opens. The tests follow each other,
on one machine: run all of them.
"""

import json

import pytest
from boot.machine import LONG
from boot.node import BOOTSTRAP, CONFIG, LAZY, STORE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LONG)]
WHEELS = "/srv/wheels"
FLAGS = (
    "--yes", "--offline", WHEELS, "--store", f"file://{STORE}", "--format", "--verify-image", LAZY, "--json",
)  # fmt: skip
RESTART = "restart containerd.service"
_PLACE = "/tmp/shims"  # what the machine has there is not compared; /run allows no programs
_TRACE, _SAID, _FIFOS = f"{_PLACE}.trace", "/var/log/bootstrap", f"{_PLACE}.wheels"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KILLED = 137  # a shell's word for SIGKILL
# 0: everything of the group that setsid began, the bootstrap and this shell among them.
_SHIM = """#!/bin/sh
PATH={path}
real=$(command -v "${{0##*/}}")
case "$*" in *"{words}"*) ;; *) exec "$real" "$@" ;; esac
{first}
kill -9 0
"""
THEN_ITSELF = '"$real" "$@"'
# Its third write is the last thing it does.
HALF = f'strace -o {_TRACE} -e trace=pwrite64 -e inject=pwrite64:signal=KILL:when=3 "$real" "$@"'
_RUN = f'PATH={_PLACE}:{_PATH}; export PATH; setsid --wait {BOOTSTRAP} "$@" >{_SAID} 2>&1 || exit $?'
# $1: a FIFO. Opening it waits until pip has it open, or the bootstrap is over; pip then waits for what never comes.
_RUN_INTO_FIFO = f"""
fifo=$1; shift
{{
  code=0
  setsid --wait sh -c 'echo $$ >{_PLACE}.group; exec "$@"' sh {BOOTSTRAP} "$@" >{_SAID} 2>&1 || code=$?
  echo $code >{_PLACE}.code
  [ $code = {_KILLED} ] || cat "$fifo" >/dev/null
}} &
exec 3>"$fifo"
kill -9 -$(cat {_PLACE}.group)
exec 3>&-
wait
exit $(cat {_PLACE}.code)
"""


@pytest.fixture(scope="module")
def node(make_node):
    return make_node(("empty", b""))


def killed_at(node, program, words, first, *flags):
    """Run the bootstrap until it runs `program` with `words`: a shell does `first` instead, then all is killed."""
    shim = f"{_PLACE}/{program}"
    node.sh(f"rm -rf {_PLACE}; mkdir {_PLACE}")
    node.write(shim, _SHIM.format(path=_PATH, words=words, first=first))
    node.run("chmod", "755", shim)
    done = node.run("/bin/sh", "-c", _RUN, "sh", *flags, check=False, seconds=LONG)
    assert done.returncode == _KILLED, f"not killed at {program} {words}: {done.stderr}{node.read(_SAID)}"


def test_the_next_run_finishes_what_was_killed_while_pip_installs(node):
    node.sh(f"mkdir {_FIFOS}; ln -s {WHEELS}/* {_FIFOS}; cd {_FIFOS}; set -- botocore-*.whl; rm $1; mkfifo $1")
    fifo = node.sh(f"ls {_FIFOS}/botocore-*.whl").strip()
    flags = [_FIFOS if flag == WHEELS else flag for flag in FLAGS]
    done = node.run("/bin/sh", "-c", _RUN_INTO_FIFO, "sh", fifo, *flags, check=False, seconds=LONG)
    assert done.returncode == _KILLED, f"{done.stderr}{node.read(_SAID)}"
    assert node.sh("ls /opt/floe/versions/*/bin/python; ls /opt/floe/versions/*/complete || true").count("\n") == 1


def test_a_disk_half_formatted_is_formatted_again(node):
    killed_at(node, "mkfs.ext4", "", HALF, *FLAGS)
    assert "killed by SIGKILL" in node.read(_TRACE)
    assert json.loads(node.read("/var/lib/floe/node/record.json"))["formatting"] != []


def test_containerd_is_restarted_by_the_run_after_that_which_configured_it(node):
    killed_at(node, "systemctl", RESTART, ":", *FLAGS)
    assert "proxy_plugins.floe" in node.read(CONFIG)
    began = node.show("containerd", "MainPID")
    report = json.loads(node.bootstrap(*FLAGS).stdout)
    assert report["exit_status"] == 0
    assert any("it runs" in line for line in report["done"])
    assert node.show("containerd", "MainPID") != began
    assert node.sh("ls /opt/floe/versions | wc -l").strip() == "1"
    assert node.sh("systemctl --failed --plain --no-legend") == ""
    again = json.loads(node.bootstrap("--yes", "--offline", WHEELS, "--json").stdout)
    assert again["done"] == []


def test_an_uninstall_killed_before_and_after_containerds_restart_is_finished_by_the_next_one(node):
    for first in (":", THEN_ITSELF):
        began = node.show("containerd", "MainPID")
        killed_at(node, "systemctl", RESTART, first, "--uninstall", "--yes")
        assert (node.show("containerd", "MainPID") != began) == (first == THEN_ITSELF)
        assert node.read(CONFIG) == node.before
        assert node.show("floe-snapshotter", "ActiveState") == "active"
    node.bootstrap("--uninstall", "--yes")
    assert node.read(CONFIG) == node.before
    assert node.everything() == node.at_first
    assert node.sh("blkid $1 || true", node.disks[0].name) == ""
