"""Start-up profiles over real mounts and a bucket: the second machine, the next version, a kill, a reader's permissions."""

import os
import random
import signal
import socket
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from support import seaweed
from support.floe_node import Node, wait_until
from support.slow_proxy import SlowProxy

from floe.protos.packfs_control import PackfsClient, announce
from floe.store.objects import open_store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1 << 20
SIZE = 48 * MIB
TOUCHED = [44, 3, 17, 30, 8, 39, 26, 12]  # MiB of the file that a start reads, in this order


class Fleet:
    """A bucket, and machines that reach it through a proxy that counts what is sent."""

    def __init__(self, folder):
        self.folder = folder
        self.server = seaweed.running()
        self.bucket = self.server.bucket()
        upstream = urlsplit(self.server.endpoint)
        self.proxy = SlowProxy((upstream.hostname, upstream.port), latency=0.002)
        self.nodes = []
        self.pusher = self.node("pusher")
        self.model = folder / "model"
        self.model.mkdir()
        self.content = random.Random(7).randbytes(SIZE)
        (self.model / "weights").write_bytes(self.content)

    def node(self, name, **environ):
        home = self.folder / name
        home.mkdir()
        node = Node(home)
        url = self.server.url(self.bucket, "fleet", endpoint=f"http://{self.proxy.address}")
        node.environ |= {**self.server.environment(), "FLOE_STORE": url, "FLOE_INDEX": "none", **environ}
        self.nodes.append(node)
        return node

    def push(self, tag):
        return self.pusher.json("model", "push", self.model, f"acme/m:{tag}")

    def objects(self):
        """The profiles, and what tells whether they changed."""
        with closing(open_store(self.pusher.environ["FLOE_STORE"])) as store:
            return {info.key: info.version for info in store.list("profiles")}

    def put(self, key, data):
        with closing(open_store(self.pusher.environ["FLOE_STORE"])) as store:
            store.put(key, data)

    def close(self):
        for node in self.nodes:
            node.clean_up()
        self.proxy.close()


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    made = Fleet(tmp_path)
    yield made
    made.close()


def mount(node, tag="1"):
    node.floe("model", "mount", f"acme/m:{tag}", node.home / "mnt")
    return node.home / "mnt" / "weights"


def umount(node):
    """The last one stops the pack filesystem, which says first what it recorded; its log."""
    node.floe("umount", node.home / "mnt")
    return (node.run_dir / "packfs.log").read_text()


def read(path, content):
    """As a program does that jumps about in a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for number in TOUCHED:
            assert os.pread(fd, MIB, number * MIB) == content[number * MIB : (number + 1) * MIB]
    finally:
        os.close(fd)


def counters(node):
    return PackfsClient(node.run_dir).status()["counters"]


def start_with_profile(fleet, node, tag, content):
    """A cold start whose reads come after the replay: all bytes sent for it, mount included, beside those touched."""
    before = fleet.proxy.passed
    path = mount(node, tag)
    wait_until(lambda: counters(node)["profile_frames"] >= len(TOUCHED) and not counters(node)["memory_bytes"])
    replayed = fleet.proxy.passed
    assert replayed > before
    read(path, content)
    found = counters(node)
    assert (found["profiles_found"], found["store_requests"]) == (1, 0)
    assert fleet.proxy.passed == replayed  # everything was fetched before it was asked for
    assert fleet.proxy.passed - before <= 1.3 * len(TOUCHED) * MIB


@pytest.mark.slow
def test_the_second_machine_and_the_next_version(fleet):
    fleet.push("1")
    first, second, third = (fleet.node(name) for name in ("first", "second", "third"))
    read(mount(first), fleet.content)
    assert counters(first)["store_requests"] > 0
    umount(first)
    start_with_profile(fleet, second, "1", fleet.content)
    assert f"{len(TOUCHED)} frames (8.00 MiB) replayed" in second.floe("status").stdout
    umount(second)

    following = random.Random(8).randbytes(SIZE)  # nothing of it is stored yet
    (fleet.model / "weights").write_bytes(following)
    (fleet.model / "another").write_bytes(bytes(range(256)) * 40_000)
    fleet.push("2")
    start_with_profile(fleet, third, "2", following)
    umount(third)

    shown = third.json("model", "profile", "acme/m:2")
    assert (shown["starts"], shown["source"], shown["source_starts"]) == (1, "models/acme/m", 3)
    assert shown["frame_bytes"] == len(TOUCHED) * MIB
    assert [file["path"] for file in shown["files"]] == ["weights"]
    assert "1 start recorded" in third.floe("model", "profile", "acme/m:2").stdout
    assert "cleared the profile" in fleet.pusher.floe("model", "profile", "acme/m:2", "--clear").stdout
    assert "there was no profile" in fleet.pusher.floe("model", "profile", "acme/m:2", "--clear").stdout
    shown = third.json("model", "profile", "acme/m:2")
    assert (shown["starts"], shown["source"], shown["source_starts"], shown["files"]) == (0, "models/acme/m", 0, [])
    assert third.json("model", "profile", "acme/m:1")["starts"] == 2
    third.floe("model", "profile", "acme/none", code=1)


@pytest.mark.slow
def test_a_killed_worker_publishes_nothing_and_a_damaged_profile_is_replaced(fleet):
    tree = fleet.push("1")["tree"]
    before = fleet.objects()
    node = fleet.node("killed")
    path = mount(node)
    read(path, fleet.content)
    worker = PackfsClient(node.run_dir).ping()
    os.kill(worker, signal.SIGKILL)
    read(path, fleet.content)
    wait_until(lambda: (node.run_dir / "worker.pid").read_text() != f"{worker}\n")
    umount(node)
    assert fleet.objects() == before

    (key,) = [key for key in before if tree in key]
    fleet.put(key, b"FLOEPROF, or what is left of it")
    other = fleet.node("other")
    read(mount(other), fleet.content)
    assert f"{key} " in umount(other)
    assert other.json("model", "profile", "acme/m:1")["starts"] == 1


def test_a_machine_that_may_only_read_says_so_and_reads(fleet):
    fleet.push("1")
    before = fleet.objects()
    keys = {"AWS_ACCESS_KEY_ID": seaweed.READER_KEY, "AWS_SECRET_ACCESS_KEY": seaweed.READER_SECRET}
    node = fleet.node("reader", **keys)
    read(mount(node), fleet.content)
    assert "start-up profiles are not kept: this node may not write" in umount(node)
    assert fleet.objects() == before


def test_a_mount_waits_for_nobody_to_take_note(tmp_path):
    announce(tmp_path / "nothing", "a" * 64, ["b" * 64])
    announce(tmp_path, "a" * 64, [])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "packfs.sock"))
        silent.listen(0)
        for _ in range(4):  # its queue is full after one
            announce(tmp_path, "a" * 64, ["b" * 64] * 256)
        peer, _ = silent.accept()
        with peer:
            assert peer.recv(1 << 20).startswith(b'{"op":"mounted","tree":"aaaa')
