"""A test session that was killed leaves processes, mounts, networks and folders: the next one takes them away, and nothing else."""

import getpass
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import sweep
from support.floe_node import wait_until

SESSION = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import sweep
from support.netns import Network
assert sweep.begin() is not None
place = sweep.folder("sweep", Path("/run"))
subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
helper = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
network = Network()
namespace = network.namespace()
subprocess.Popen([*namespace.prefix, "sleep", "1000"])
print(place, helper.pid, network.bridge, namespace.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def session():
    """Another session that runs: its process, its folder with a mount on it, the leader of what it started, its bridge and network namespace."""
    script = SESSION.format(tests=str(Path(sweep.__file__).parents[1]))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        place, helper, bridge, namespace = process.stdout.readline().split()
        yield process, Path(place), int(helper), Path("/sys/class/net", bridge), Path("/run/netns", namespace)
        process.kill()
    sweep.begin()


def running(group):
    """Processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_what_a_killed_session_left_is_swept(session):
    process, place, helper, bridge, namespace = session
    wait_until(lambda: len(running(helper)) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = sweep.begin()
    assert running(helper) == []
    assert not any(path.exists() for path in (place, bridge, namespace))
    assert any(line.startswith(f"process {helper}, ") for line in found)
    assert {f"mount {place}", f"folder {place}", f"link {bridge.name}", f"netns {namespace.name}"} <= set(found)


def test_a_session_that_runs_is_left_alone(session):
    _, place, helper, bridge, namespace = session
    wait_until(lambda: len(running(helper)) == 2)
    assert not [line for line in sweep.begin() if str(place) in line or str(helper) in line]
    assert os.path.ismount(place)
    assert bridge.exists()
    assert namespace.exists()
    assert len(running(helper)) == 2


def test_mounts_that_an_ended_session_left_in_pytests_folders_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    home = tmp_path / f"pytest-of-{getpass.getuser()}"
    places = [home / name / "test_broken_off0/mnt" for name in ("pytest-3", "garbage-c0ffee", "pytest-4")]
    for place in places:
        place.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    (home / "pytest-4/.lock").write_text(str(os.getpid()))  # that session still runs
    try:
        found = sweep.begin()
        assert [os.path.ismount(place) for place in places] == [False, False, True]
        assert {f"mount {place}" for place in places[:2]} <= set(found)
    finally:
        for place in places:
            subprocess.run(["umount", "--quiet", str(place)], check=False)
