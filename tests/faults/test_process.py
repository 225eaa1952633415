"""Owning a directory, talking to systemd, and refusing to run from a Floe mount."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from floe.mount.mountinfo import mount_at, read_mounts
from floe.store import mounttable, process
from floe.store.errors import BusyError, PreconditionError


def test_the_second_owner_is_refused_naming_the_first(tmp_path):
    with process.own_directory(tmp_path / "run", "keeper") as owned:
        assert owned.previous is None
        assert (tmp_path / "run/keeper.pid").read_text() == f"{os.getpid()}\n"
        with pytest.raises(BusyError, match=f"process {os.getpid()}"):
            process.own_directory(tmp_path / "run", "keeper")
        process.own_directory(tmp_path / "run", "other").release()
    assert not (tmp_path / "run/keeper.pid").exists()


def test_a_killed_owner_leaves_its_name_and_no_lock(tmp_path):
    code = (
        "import sys; from pathlib import Path; from floe.store.process import own_directory\n"
        "o=own_directory(Path(sys.argv[1]),'keeper'); print('up',flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"up\n"
        other.send_signal(signal.SIGKILL)
    with process.own_directory(tmp_path, "keeper") as owned:
        assert owned.previous == other.pid


def test_hardening_does_what_it_can_and_says_what_it_cannot():
    code = (
        "from floe.store import process; print(*process.harden(), sep='\\n'); print(open('/proc/self/status').read())"
    )
    code += "; print('score', open('/proc/self/oom_score_adj').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (locked,) = (int(line.split()[1]) for line in done.stdout.split("\n") if line.startswith("VmLck:"))
    assert (locked > 0) != ("memory is not locked" in done.stdout)
    assert ("score -999" in done.stdout) != ("oom_score_adj stays as it is" in done.stdout)
    if os.geteuid() == 0:
        assert locked > 0


def test_a_doomed_process_is_told_from_one_that_lives_and_one_that_is_gone():
    with subprocess.Popen(["sleep", "60"]) as child:
        assert not process.is_doomed(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.is_doomed(child.pid)
    assert not process.is_doomed(child.pid)


def test_nobody_to_notify(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not process.sd_notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not process.sd_notify("READY=1")


def test_a_heart_beats_often_enough_and_only_for_who_is_asked(monkeypatch):
    said = []
    now = [5.0]
    monkeypatch.setattr(process, "sd_notify", said.append)
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    for pid, pause in (("", 1.0), (str(os.getpid()), 1.0), ("1", None)):
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        monkeypatch.setenv("WATCHDOG_PID", pid)
        assert process.Heartbeat().pause == pause
        assert "WATCHDOG_USEC" not in os.environ
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    heart = process.Heartbeat()
    for now[0] in (5.0, 5.1, 5.4, 5.5, 5.9, 7.0):
        heart.beat()
    assert said == ["WATCHDOG=1"] * 3
    process.Heartbeat().beat()
    assert len(said) == 3


def test_descriptors_for_another_process_are_not_ours(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert process.listen_fds() == {}
    assert "LISTEN_FDS" not in os.environ


def test_mounts_are_parsed_with_escapes():
    line = r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime shared:1 - ext3 /dev/root rw,errors=continue"
    (mount,) = mounttable.parse(line + "\n")
    assert mount == ((98, 0), "/mnt1", "/mnt 2", "ext3", "/dev/root", "rw,errors=continue")


def test_the_node_s_mounts_are_read_whatever_their_names(tmp_path):
    target = tmp_path / "a\rb\x0cc\x85d"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], check=True)
    try:
        assert [mount.fstype for mount in mounttable.mounts_at(target)] == ["tmpfs"]
        assert mount_at(str(target), read_mounts()).fstype == "tmpfs"
    finally:
        subprocess.run(["umount", str(target)], check=True)


def _mount(device, target, fstype, options=""):
    return mounttable.Mount((0, device), "/", target, fstype, "x", options)


def test_running_from_a_tree_is_refused(tmp_path, monkeypatch):
    device = Path(os.__file__).stat().st_dev
    tree = mounttable.Mount((os.major(device), os.minor(device)), "/", f"{tmp_path}/trees/a", "erofs", "x", "")
    process.refuse_own_mount(tmp_path)
    monkeypatch.setattr(mounttable, "mounts", lambda: [tree])
    with pytest.raises(PreconditionError, match="runs from a Floe mount"):
        process.refuse_own_mount(tmp_path)
    process.refuse_own_mount(tmp_path / "elsewhere")


def test_an_overlay_above_a_bound_tree_counts():
    mounts = [
        _mount(1, "/", "ext4"),
        _mount(7, "/run/floe/trees/a", "erofs"),
        _mount(7, "/root/s/1/fs", "erofs"),
        _mount(8, "/c1", "overlay", "ro,lowerdir=/root/s/2/fs:/root/s/1/fs,x=y"),
        _mount(9, "/c2", "overlay", "ro,lowerdir=/root/s/2/fs"),
        _mount(10, "/other", "erofs"),
    ]
    assert process._tree_devices("/run/floe", mounts) == {(0, 7), (0, 8)}
