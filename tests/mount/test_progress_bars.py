"""What takes long shows a bar on a terminal, with bytes, rate and time left, and is quiet everywhere else."""

import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from support.floe_node import Node
from support.images import build_oci, files

# By its name what a bar says; before a command what it needs.
COMMANDS = {
    "push": (("model", "push", "{m}", "iris:1"), "push iris:1"),
    "publish": (("model", "publish", "iris:1", "oci:{tmp}/published:1"), "publish"),
    "export": (("model", "export", "iris:1", "{tmp}/exported-{run}"), "export iris:1"),
    "verify": (("model", "verify", "iris:1"), "verify iris:1"),
    "copy": (("model", "copy", "iris:1", "file://{tmp}/other-{run}", "--as", "copied:1"), "copy iris:1"),
    "index": (("image", "index", "{image}"), "index"),
    "weights": (("image", "weights", "{image}"), "read"),
    "attach": (("image", "attach", "{image}", "oci:{tmp}/attached:1", "--model", "iris:1=/m"), "attach"),
    "detach": (("image", "detach", "oci:{tmp}/attached:1", "oci:{tmp}/detached:1", "--all"), "detach"),
    "extract": (("image", "detach", "{image}", "oci:{tmp}/lean:1", "--directory", "/data=data:{run}"), "detach"),
    "fsck": (("fsck", "--deep"), "check"),
    "fsck of a cache": (("fsck", "--cache"), "check"),
    "rebuild-index": (("rebuild-index",), "index"),
}
LONG = {name: COMMANDS[name] for name in COMMANDS if name != "push"}
COMMANDS["gc"] = (("gc",), "look")  # nobody knows before how much there is to look at


@pytest.fixture
def machine(tmp_path):
    node = Node(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(2 << 20))
    image = build_oci(tmp_path / "image", [files({"etc/a": "a", "data/w": os.urandom(2 << 20)})], tag="1")
    node.words = {"m": folder, "tmp": tmp_path, "image": image.source}
    yield node
    node.clean_up()


def run(machine, name, *, terminal):
    """What the command says on stderr; its stdout is a pipe."""
    words = {**machine.words, "run": "terminal" if terminal else "pipe"}
    command = [sys.executable, "-m", "floe", *(str(word).format(**words) for word in COMMANDS[name][0])]
    environ = {**machine.environ, "TERM": "xterm-256color", "COLUMNS": "400"}
    if not terminal:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr
    master, slave = pty.openpty()
    seen = []

    def read():
        try:
            while data := os.read(master, 65536):
                seen.append(data)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=slave, timeout=60, check=False)
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(seen).decode())
    assert done.returncode == 0, text
    assert b"\x1b" not in done.stdout
    return text


def is_shown(text, says):
    """Whether a bar with this description was drawn to its end: bytes of all there are, a rate, and the time left."""
    done = r"([\d.]+)/\1 (?:bytes|[KM]iB) (?:\?|[\d.]+ (?:bytes|[kMG]B)/s) 0:00:00"
    return re.search(rf"{re.escape(says)}.* {done}", text)


def test_a_push_shows_how_far_it_is_on_a_terminal_and_says_nothing_in_a_pipe(machine):
    text = run(machine, "push", terminal=True)
    assert is_shown(text, "push iris:1"), text
    assert "\x1b" not in run(machine, "push", terminal=False)


@pytest.mark.slow
def test_so_does_all_that_takes_long(machine):
    machine.floe("model", "push", machine.words["m"], "iris:1")
    for name, (_, says) in LONG.items():
        text = run(machine, name, terminal=True)
        assert is_shown(text, says), (name, text)
        quiet = run(machine, name, terminal=False)
        assert "\x1b" not in quiet, name
        assert says not in quiet, (name, quiet)
    assert "look" in run(machine, "gc", terminal=True)
    assert run(machine, "gc", terminal=False) == ""
