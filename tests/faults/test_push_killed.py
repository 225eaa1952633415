"""`floe model push` killed at random points and run again: next to nothing is sent twice, nothing is left, same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import uuid

import pytest
from support import seaweed
from support.fakegcs import FakeGCS
from support.floe_node import Node
from support.s3gate import S3Gate

from floe.store import layout
from floe.store.objects import multipart, open_store

CHUNK = 4 << 20


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    made.environ |= seaweed.running().environment()
    model = tmp_path / "model"
    model.mkdir()
    generator = random.Random(5)
    for number in range(3):
        (model / f"part-{number}").write_bytes(generator.randbytes(6 * CHUNK + 1000 * number))
    (model / "config.json").write_text("{}")
    yield made
    made.clean_up()


@pytest.fixture(params=["s3", "gs"])
def server(request, node):
    if request.param == "s3":
        with S3Gate(seaweed.running(), {seaweed.ACCESS_KEY: None}) as gate:
            node.environ["FLOE_STORE"] = gate.address(seaweed.shared_bucket(), f"killed/{uuid.uuid4().hex}")
            yield gate
    else:
        with FakeGCS() as google:
            node.environ["FLOE_STORE"] = google.address(google.bucket(), "killed")
            yield google


def push(node):
    return subprocess.Popen(
        [sys.executable, "-m", "floe", "model", "push", str(node.home / "model"), "m"],
        env=node.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def killed_at(server, node, request):
    """Run a push that is killed when its request of that number arrives; whether it came so far."""
    lock, left = threading.Lock(), [request]
    child = push(node)

    def kill(*_):
        with lock:
            left[0] -= 1
            if not left[0]:
                child.send_signal(signal.SIGKILL)

    server.before = kill
    code = child.wait(60)
    server.before = lambda *_: None
    server.settle()
    assert code in (0, -signal.SIGKILL)
    return code != 0


def opened(node, monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    return open_store(node.environ["FLOE_STORE"], retry=False)


def wanted(node, tmp_path):
    """The objects that an uninterrupted push of the same model into a folder makes, of those named by their content."""
    node.environ["FLOE_STORE"] = f"file://{tmp_path}/undisturbed"
    node.floe("model", "push", node.home / "model", "m")
    store = open_store(node.environ["FLOE_STORE"])
    folders = (layout.PACKS, layout.PACK_INDEXES, layout.CHUNK_TABLES, layout.TREES)
    return {info.key: bytes(store.get(info.key)) for folder in folders for info in store.list(folder)}


@pytest.mark.slow
def test_a_killed_push_sends_at_most_one_part_twice(node, server, tmp_path, monkeypatch):
    generator = random.Random(1)
    kills = 0
    while killed_at(server, node, generator.randrange(6, 16)) and kills < 3:
        kills += 1
    assert kills
    assert push(node).wait(60) == 0
    pushed = node.json("model", "show", "m")
    packs = [pack["id"] for pack in pushed["packs"]]
    arrived = {name: count for name, count in server.parts.items() if any(pack in name[0] for pack in packs)}
    size = sum(pack["stored_bytes"] for pack in pushed["packs"])
    assert len(arrived) == -(-size // multipart.PART)
    assert sum(arrived.values()) <= len(arrived) + 1
    store = opened(node, monkeypatch)
    assert store.multipart.uploads.find("packs/") == [], "an upload was left"
    expected = wanted(node, tmp_path)
    found = {info.key for folder in ("packs", "indexes", "chunks", "trees") for info in store.list(folder)}
    assert found == set(expected)
    assert all(bytes(store.get(key)) == data for key, data in expected.items())
    assert list((node.cache / "spool").iterdir()) == []
    store.close()


def test_killed_after_its_pack_a_push_does_not_send_it_again(node, server):
    """The window between the pack and its chunk table, which the index follows, and by which it would be found."""
    child = push(node)

    def kill(action, key):
        if action in ("s3:PutObject", "storage.objects.create") and "/chunks/" in key:
            child.send_signal(signal.SIGKILL)
            raise ConnectionAbortedError  # it never arrives

    server.before = kill
    assert child.wait(60) == -signal.SIGKILL
    server.before = lambda *_: None
    server.settle()
    assert push(node).wait(60) == 0
    (pack,) = node.json("model", "show", "m")["packs"]
    arrived = [count for (key, _), count in server.parts.items() if pack["id"] in key]
    assert len(arrived) == -(-pack["stored_bytes"] // multipart.PART)
    assert set(arrived) == {1}


def test_a_push_to_a_folder_that_was_killed_leaves_nothing_once_it_was_run_again(node):
    """The kill falls between the copying of the pack and its rename."""
    program = (
        "import os, signal, sys\n"
        "from floe.cli.main import main\n"
        "from floe.store.objects import file\n"
        "copy = file._copy\n"
        "file._copy = lambda *args: (copy(*args), os.kill(os.getpid(), signal.SIGKILL))\n"
        "main(['model', 'push', sys.argv[1], 'm'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, node.home / "model"], env=node.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    temporary = node.store / ".tmp"
    assert [path.stat().st_size > 17 * CHUNK for path in temporary.iterdir()] == [True]
    assert push(node).wait(60) == 0
    assert list(temporary.iterdir()) == []
    assert list((node.cache / "spool").iterdir()) == []
    assert len(node.json("model", "show", "m")["packs"]) == 1
