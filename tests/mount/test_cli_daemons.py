"""`floe packfs` and `floe snapshotter` as an administrator meets them."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.floe_daemons import Daemons
from support.floe_node import wait_until

from floe.store.exposition import read_metrics
from floe.store.ids import hexdigest

SIZE = 24 << 20


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h")
    yield made
    made.close()


@pytest.fixture
def model(daemons, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(SIZE))
    daemons.floe("model", "push", folder, "iris")
    return folder / "weights"


def pid(daemons, name):
    return int((daemons.run_dir / name).read_text())


def memory(process, key="VmHWM"):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(key)


def value(text, metric):
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(metric))


def test_memory_and_metrics_of_a_node_that_streams(daemons, model, tmp_path):
    mountpoint = tmp_path / "mnt"
    daemons.floe("model", "mount", "iris", mountpoint)
    assert hexdigest((mountpoint / "weights").read_bytes()) == hexdigest(model.read_bytes())

    assert memory(daemons.packfs.pid) < 25 << 20
    assert memory(pid(daemons, "worker.pid")) < 350 << 20
    assert memory(daemons.snapshotter.pid) < 120 << 20
    keeper = Path(f"/proc/{daemons.packfs.pid}")
    assert len(list((keeper / "task").iterdir())) == 1
    assert b"floe.fuse.keeper" in (keeper / "cmdline").read_bytes()

    packfs = read_metrics(f"unix:{daemons.run_dir}/packfs-metrics.sock")
    assert value(packfs, "floe_mounts") == 1
    fetched = value(packfs, 'floe_bytes_total{source="store"}') + value(packfs, 'floe_bytes_total{source="readahead"}')
    assert fetched >= SIZE
    assert value(packfs, "floe_packfs_kernel_read_bytes_total") >= SIZE
    snapshotter = read_metrics(f"unix:{daemons.run_dir}/snapshotter-metrics.sock")
    assert 'floe_snapshotter_fallbacks_total{reason="not_indexed"} 0.0' in snapshotter

    status = daemons.json("status")
    assert status["packfs"]["keeper_pid"] == daemons.packfs.pid
    assert status["snapshotter"]["pid"] == daemons.snapshotter.pid
    assert status["cache"]["used_bytes"] >= SIZE
    assert status["cache"]["complete_packs"] == 1
    people = daemons.floe("status").stdout
    assert f"keeper {daemons.packfs.pid}" in people
    assert f"process {daemons.snapshotter.pid}" in people
    daemons.floe("umount", mountpoint)


def test_a_stop_with_packs_in_use_leaves_readers_waiting_for_the_next_start(daemons, model, tmp_path):
    mountpoint = tmp_path / "mnt"
    daemons.floe("model", "mount", "iris", mountpoint)
    first = daemons.packfs
    first.terminate()
    wait_until(lambda: "packs are in use" in daemons.log("packfs").read_text())
    wait_until(lambda: not daemons.json("status")["packfs"]["running"])
    assert first.poll() is None
    found = []
    reading = threading.Thread(target=lambda: found.append((mountpoint / "weights").read_bytes()))
    reading.start()
    daemons.packfs = daemons.start("packfs")
    reading.join(30)
    assert found == [model.read_bytes()]
    assert first.wait(20) == 0
    assert (mountpoint / "weights").stat().st_size == SIZE
    daemons.floe("umount", mountpoint)


def test_force_ends_it_though_packs_are_in_use(daemons, model, tmp_path):
    mountpoint = tmp_path / "mnt"
    daemons.floe("model", "mount", "iris", mountpoint)
    daemons.floe("packfs", "--force")
    assert daemons.packfs.wait(20) == 0
    with pytest.raises(OSError, match="Input/output error"):
        (mountpoint / "weights").read_bytes()
    assert not daemons.json("status")["packfs"]["running"]
    daemons.floe("umount", mountpoint)


def test_a_second_daemon_on_the_same_directory_names_the_first(daemons):
    assert f"process {daemons.packfs.pid}" in daemons.floe("packfs", code=1).stderr
    assert f"process {daemons.snapshotter.pid}" in daemons.floe("snapshotter", code=1).stderr
    other = ["--root", daemons.home / "other", "--run-dir", daemons.home / "r", "--address", daemons.address]
    assert str(daemons.address) in daemons.floe("snapshotter", *other, code=1).stderr
    assert daemons.json("status")["snapshotter"]["running"]


def test_sigterm_ends_both_in_order(daemons):
    for process in (daemons.snapshotter, daemons.packfs):
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    wait_until(lambda: not daemons.processes())
    assert daemons.mounts() == []
    left = {path.name for path in daemons.run_dir.iterdir() if path.is_socket() or path.name.endswith(".pid")}
    assert left == set()
    status = daemons.json("status")
    assert (status["packfs"]["state"], status["snapshotter"]["state"]) == ("not running", "not running")


def test_the_pack_filesystem_starts_without_its_store(daemons):
    daemons.packfs.terminate()
    assert daemons.packfs.wait(20) == 0
    daemons.environ["FLOE_STORE"] = "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=r&path_style=true"
    daemons.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    daemons.packfs = daemons.start("packfs")
    assert daemons.json("status")["packfs"]["running"]


def test_metrics_that_cannot_be_served_stop_no_reader(daemons):
    daemons.packfs.terminate()
    assert daemons.packfs.wait(20) == 0
    (daemons.run_dir / "taken").write_text("precious")
    daemons.packfs = daemons.start("packfs", "--metrics", f"unix:{daemons.run_dir}/taken")
    assert "no metrics" in daemons.log("packfs").read_text()
    assert (daemons.run_dir / "taken").read_text() == "precious"


def test_json_log_lines(daemons):
    daemons.snapshotter.terminate()
    assert daemons.snapshotter.wait(20) == 0
    daemons.log("snapshotter").unlink()
    daemons.snapshotter = daemons.start("snapshotter", "--log-format", "json", "--log-level", "debug")
    lines = [json.loads(line) for line in daemons.log("snapshotter").read_text().splitlines()]
    assert any("serving snapshots" in line["message"] for line in lines)
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in lines)


def test_the_worker_is_not_started_by_hand(daemons):
    found = subprocess.run(
        [sys.executable, "-m", "floe", "packfs", "--worker", "--cache-dir", str(daemons.home / "other")],
        env=daemons.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert found.returncode == 2
    assert "not by hand" in found.stderr
    assert daemons.json("status")["packfs"]["running"]
