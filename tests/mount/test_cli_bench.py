"""`floe bench` on real stores, disks and mounts: what it measures, and that it leaves nothing behind, however it ends."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import seaweed, sweep
from support.floe_node import Node, wait_until
from support.slow_proxy import SlowProxy

from floe.selfbench.figures import GREW_NO_MORE, MOST
from floe.store.objects import open_store

NOBODY = 65534
TINY = ("--seconds", "1", "--size", "8MiB")
ENOUGH = ("--seconds", "5", "--size", "256MiB")  # for a verdict, where a model is of LARGE
LARGE = 48 << 20
JUDGED = "Reading 1 GiB for the first time here is bound by "
UNJUDGED = "What binds a first reading here is not known: too little was read of the store."


@pytest.fixture
def node():
    home = sweep.folder("bench", Path("/var/tmp"))  # short: the path of a socket in it has 107 bytes at most
    node = Node(home)
    yield node
    node.clean_up()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def bucket(node, monkeypatch):
    """The node's store in S3, with a model; a client of the store for looking into it."""
    server = seaweed.running()
    node.environ |= {**server.environment(), "FLOE_STORE": server.url(server.bucket(), "fleet")}
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    push(node)
    with closing(open_store(node.environ["FLOE_STORE"])) as store:
        yield store


def push(node, size=6 << 20):
    folder = node.home / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(size))
    for number in range(20):
        (folder / "sub" / f"{number}.py").write_bytes(os.urandom(3000))
    node.floe("model", "push", folder, "iris")


def processes(node):
    """Of anything below the node's home."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(node.home).encode() in words:
            found.append(words.replace(b"\0", b" "))
    return found


def assert_nothing_is_left(node):
    wait_until(lambda: not processes(node))
    assert node.mounts() == []
    assert not (node.cache / "bench").exists()


def begin(node, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "floe", "bench", *flags],
        env=node.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads of ours run
    )


def interrupt(node, condition, number, *flags):
    """Start a bench, and send it a signal once `condition` holds; how it ended. Again when it was faster than we."""
    for _ in range(3):
        process = begin(node, *flags)
        wait_until(lambda process=process: condition() or process.poll() is not None, 60)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            return process.returncode, said.decode()
    raise AssertionError("it ended before it could be interrupted")


def test_a_folder_is_measured_and_left_as_it_was(node):
    push(node, LARGE)
    before = {path: path.stat().st_mtime_ns for path in node.store.rglob("*")}
    found = node.json("bench", *ENOUGH)
    assert {part: found[part]["state"] for part in ("network", "store", "cpu", "disk", "mount")} == {
        "network": "skipped",
        "store": "measured",
        "cpu": "measured",
        "disk": "measured",
        "mount": "measured",
    }
    store, disk, mount = found["store"], found["disk"], found["mount"]
    assert store["gets"] > 0
    assert 0 < store["get_median_seconds"] <= store["get_p99_seconds"]
    assert store["steps"][0]["connections"] == 1
    assert sum(step["bytes"] for step in store["steps"]) <= 256 << 20
    assert store["best_bytes_per_second"] == max(step["bytes_per_second"] for step in store["steps"])
    assert found["cpu"]["of_the_store"]
    assert 0 < disk["bytes"] <= 64 << 20
    assert disk["path"] == str(node.cache / "bench")
    assert (mount["model"], mount["from_store"], mount["small_files"]) == ("iris:latest", True, 20)
    assert 0 < mount["bytes"] <= 32 << 20
    assert found["limit"] != "unknown"
    assert found["sentence"].startswith(JUDGED)
    assert not any("too small to tell" in line for line in found["remarks"])
    assert_nothing_is_left(node)
    assert {path: path.stat().st_mtime_ns for path in node.store.rglob("*")} == before
    assert not list(node.cache.glob("packs/*"))  # the user's cache has no part in it
    assert not node.run_dir.exists()


def test_a_bucket_that_may_only_be_read(node, bucket):
    node.environ |= {"AWS_ACCESS_KEY_ID": seaweed.READER_KEY, "AWS_SECRET_ACCESS_KEY": seaweed.READER_SECRET}
    done = node.floe("bench", "iris", *TINY, "--only", "store,mount")
    assert "writes nothing to the store" in done.stderr
    assert "read             1 objects, 6.0" in done.stdout
    for line in (
        "  TCP connect",
        "  GET of 4.00 KiB",
        "  1 connection ",
        "  first reading",
        "iris:latest, of the store",
    ):
        assert line in done.stdout
    assert done.stdout.splitlines()[-1] == UNJUDGED
    assert "iris:latest is too small to tell" in done.stdout
    # What may not be written is not taken for done.
    found = begin(node, *TINY, "--only", "store", "--write", "--json")
    out, said = found.communicate(timeout=60)
    assert found.returncode == 1, said
    told = json.loads(out)
    assert (told["upload"]["state"], told["store"]["state"]) == ("failed", "measured")
    assert_nothing_is_left(node)


def test_a_model_of_which_there_is_little_to_read_says_so_and_binds_nothing(node):
    """Of one small file, and of one empty one; with --write the store has something to tell by."""
    for name, size in (("small", 60_000), ("none", 0)):
        folder = node.home / name
        folder.mkdir()
        (folder / "file").write_bytes(os.urandom(size))
        node.floe("model", "push", folder, f"{name}:v1")
    found = node.json("bench", "small:v1", *ENOUGH, "--only", "store,mount")
    assert (found["limit"], found["mount"]["bytes"]) == ("unknown", 60_000)
    assert found["sentence"] == UNJUDGED
    assert ["too small to tell" in line for line in found["remarks"][:2]] == [True, True]
    for name in ("small", "none"):
        wrote = node.json("bench", f"{name}:v1", "--seconds", "5", "--size", "1GiB", "--only", "store,mount", "--write")
        assert wrote["store"]["objects_bytes"] == 64 << 20
        assert wrote["sentence"].startswith(JUDGED)
        assert f"{name}:v1 is too small to tell" in wrote["remarks"][0]
    assert_nothing_is_left(node)


def test_an_empty_bucket_is_read_after_writing_to_it(node, monkeypatch):
    server = seaweed.running()
    # Of a bucket with volumes: a new one's first uploads may take its server half a minute.
    prefix = f"bench-{uuid.uuid4().hex}"
    node.environ |= {**server.environment(), "FLOE_STORE": server.url(seaweed.shared_bucket(), prefix)}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.SECRET_KEY)
    assert node.json("bench", *TINY, "--only", "store")["store"]["state"] == "skipped"
    found = node.json("bench", *TINY, "--only", "store", "--write")
    assert found["upload"]["bytes"] == (8 << 20) // 16
    assert found["store"]["objects_bytes"] == found["upload"]["bytes"]
    assert found["store"]["ended"] in (GREW_NO_MORE, MOST, "bounded")
    with closing(open_store(node.environ["FLOE_STORE"])) as store:
        assert list(store.list("bench")) == []


def test_an_interrupt_while_mounted_leaves_nothing(node):
    mnt = str(node.cache / "bench" / "mnt")
    flags = ("--seconds", "60", "--size", "64MiB", "--only", "mount")
    code, said = interrupt(node, lambda: mnt in node.mounts(), signal.SIGINT, *flags)
    assert code == 130, said
    assert said.endswith("floe: interrupted\n")
    assert_nothing_is_left(node)


@pytest.mark.slow
def test_an_interrupt_while_writing_leaves_no_object_and_so_does_a_kill_in_the_end(node, bucket):
    upstream = ("127.0.0.1", urlsplit(seaweed.running().endpoint).port)
    proxy = SlowProxy(upstream, latency=0.1)
    straight = node.environ["FLOE_STORE"]
    node.environ["FLOE_STORE"] = straight.replace(str(upstream[1]), proxy.address.rpartition(":")[2])
    flags = ("--seconds", "60", "--size", "32MiB", "--only", "store", "--write")
    noted = node.cache / "bench" / "objects.json"
    try:
        code, said = interrupt(node, noted.exists, signal.SIGTERM, *flags)
        assert code == 130, said
        assert list(bucket.list("bench")) == []
        assert_nothing_is_left(node)
        code, _ = interrupt(node, lambda: list(bucket.list("bench")), signal.SIGKILL, *flags)
        assert code == -signal.SIGKILL
        assert list(bucket.list("bench"))
        node.floe("bench", *TINY, "--only", "cpu")
        assert list(bucket.list("bench")) == []
        assert_nothing_is_left(node)
    finally:
        proxy.close()


@pytest.mark.slow
def test_what_a_killed_run_left_is_cleared_by_the_next(node):
    mnt = str(node.cache / "bench" / "mnt")
    flags = ("--seconds", "60", "--size", "64MiB", "--only", "mount")
    code, _ = interrupt(node, lambda: mnt in node.mounts(), signal.SIGKILL, *flags)
    assert code == -signal.SIGKILL
    assert mnt in node.mounts()
    assert processes(node)
    node.floe("bench", *TINY, "--only", "cpu")
    assert_nothing_is_left(node)


def test_only_one_at_a_time(node):
    (node.cache / "bench").mkdir(parents=True)
    fd = os.open(node.cache / "bench", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert "another floe bench" in node.floe("bench", *TINY, "--only", "cpu", code=1).stderr
    finally:
        os.close(fd)


def test_what_cannot_be_done_is_refused_before_anything_is_made(node):
    for code, *flags in (
        (2, "--size", "1KiB"),
        (2, "--size", "many"),
        (2, "--seconds", "0"),
        (2, "--only", "disc"),
        (2, "--only", "disk", "--write"),
        (2, "No Such/Name/At all"),
        (1, "nobody:1"),
        (1, "--cache-min-free", "100%"),
    ):
        node.floe("bench", *flags, code=code)
        assert not node.cache.exists()
    assert "cache_min_free" in node.floe("bench", "--cache-min-free=100%", code=1).stderr


def test_a_user_who_is_not_root_gets_all_but_the_mount(node):
    node.let_others_in()
    os.chown(node.home, NOBODY, NOBODY)
    found = json.loads(node.floe("bench", *TINY, "--only", "disk,mount", "--json", user=NOBODY, group=NOBODY).stdout)
    assert found["disk"]["state"] == "measured"
    assert (found["mount"]["state"], "root" in found["mount"]["reason"]) == ("skipped", True)
    assert not (node.cache / "bench").exists()
