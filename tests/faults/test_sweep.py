"""A test session that was killed leaves processes, mounts and folders: the next one takes them away, and nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import sweep
from support.floe_node import wait_until

SESSION = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import sweep
assert sweep.begin() is not None
place = sweep.folder("sweep", Path("/run"))
subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
helper = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
print(place, helper.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def session():
    """Another session that runs: its process, its folder with a mount on it, the leader of what it started."""
    script = SESSION.format(tests=str(Path(sweep.__file__).parents[1]))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        place, helper = process.stdout.readline().split()
        yield process, Path(place), int(helper)
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
    process, place, helper = session
    wait_until(lambda: len(running(helper)) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = sweep.begin()
    assert running(helper) == []
    assert not place.exists()
    assert any(line.startswith(f"process {helper}, ") for line in found)
    assert {f"mount {place}", f"folder {place}"} <= set(found)


def test_a_session_that_runs_is_left_alone(session):
    _, place, helper = session
    wait_until(lambda: len(running(helper)) == 2)
    assert not [line for line in sweep.begin() if str(place) in line or str(helper) in line]
    assert os.path.ismount(place)
    assert len(running(helper)) == 2
