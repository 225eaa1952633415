"""`floe top` in a terminal of its own, in a pipe, and as JSON; and the frames that the worker tells over its control socket."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.floe_node import Node, wait_until

from floe.fuse.framemaps import ANSWER_BYTES, Touched
from floe.protos.packfs_control import PackfsClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def mounted(tmp_path):
    """A machine with a model of 4 MiB mounted, of which the half was read."""
    node = Node(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(os.urandom(2 << 20))
    node.environ["FLOE_READAHEAD"] = "0"
    try:
        node.floe("model", "push", folder, "iris:1")
        node.floe("model", "mount", "iris:1", tmp_path / "mnt")
        (tmp_path / "mnt/a").read_bytes()
        yield node
        node.floe("umount", tmp_path / "mnt")
    finally:
        node.clean_up()


def test_one_sample_for_scripts_and_pipes(mounted):
    found = mounted.json("top")
    (mount,) = found["mounts"]
    assert (mount["names"], mount["kind"], mount["uses"]) == (["iris:1"], "model", 1)
    assert (mount["content_bytes"], mount["here_bytes"]) == (4 << 20, 2 << 20)
    assert mount["map"] == {"here": "9900", "touched": "9900", "ahead": "0000", "pinned": "0000"}
    assert found["rates"]["seconds"] > 0
    assert [one["name"] for one in found["named"]] == ["iris:1"]
    for flags in ((), ("--once",)):  # its output is no terminal
        text = mounted.floe("top", *flags).stdout
        assert "\x1b" not in text
        assert "iris:1" in text
        assert "50%" in text
    assert "no time between samples" in mounted.floe("top", "--interval", "0", code=2).stderr


def test_what_models_share_are_the_frames_that_both_need_and_not_their_packs(mounted, tmp_path):
    other = tmp_path / "o"
    other.mkdir()
    shutil.copy(tmp_path / "m/a", other)
    (other / "c").write_bytes(os.urandom(1 << 20))
    mounted.floe("model", "push", other, "lily:1")
    mounted.floe("model", "mount", "lily:1", tmp_path / "other")
    try:
        found = mounted.json("top")
    finally:
        mounted.floe("umount", tmp_path / "other")
    named = {one["name"]: one for one in found["named"]}
    assert {name: one["shared_bytes"] for name, one in named.items()} == {"iris:1": 2 << 20, "lily:1": 2 << 20}
    assert named["iris:1"]["shares_with"] == ["lily:1"]
    trees = {one["names"][0]: one for one in found["mounts"]}
    assert trees["lily:1"]["shares_with"] == [trees["iris:1"]["tree"]]
    assert mounted.json("top")["named"][0]["shared_bytes"] == 0  # nobody else has it any more


def test_a_terminal_is_drawn_anew_until_ctrl_c(mounted, tmp_path):
    master, slave = pty.openpty()
    environ = {**mounted.environ, "TERM": "xterm-256color", "COLUMNS": "110", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-m", "floe", "top", "--interval", "0.2"], env=environ, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    seen = b""

    def shows(text):
        nonlocal seen
        until = time.monotonic() + 60
        while text not in seen and time.monotonic() < until:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536)
        return text in seen

    try:
        assert shows(b"iris:1")
        assert shows(b"50%")
        (tmp_path / "mnt/b").read_bytes()
        assert shows(b"100%")
        process.send_signal(signal.SIGINT)
        assert shows(b"\x1b[?1049l")  # the terminal is as it was
        assert process.wait(60) == 0
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_the_worker_tells_frames_by_pack(mounted):
    client = PackfsClient(mounted.run_dir)
    packs = [path.name for path in (mounted.cache / "packs").iterdir()]
    found = client.frames([*packs, "f" * 64])
    assert set(found) == set(packs)
    assert len(json.dumps(found)) < ANSWER_BYTES
    wait_until(lambda: client.frames(packs)[packs[0]]["touched"])


def test_what_is_touched_is_noted_by_frame():
    asked = []
    touched = Touched(lambda pack: asked.append(pack) or ((4096, 4) if pack == "known" else None))
    touched.note("unknown", 0, 10)
    assert touched.bits("unknown") == 0
    touched.note("known", 4096, 4097)
    touched.note("known", 4 * 4096, 10)  # past the end
    touched.note("known", 3 * 4096, 1 << 20)  # longer than the pack
    assert touched.bits("known") == 0b1110
    assert asked == ["unknown", "known"]
