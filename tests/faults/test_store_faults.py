"""Stores that fail: what the retries do, what a file store does on a bad disk, and what the catalog makes of an index."""

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.seaweed import Seaweed
from support.stores import CountdownFailureStore, RecordingStore, SilentStore, UnreachableStore

from floe.store.errors import (
    AccessDeniedError,
    ConflictError,
    CredentialsExpiredError,
    DamagedError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    ThrottledError,
    UnavailableError,
)
from floe.store.objects import file as file_module
from floe.store.objects import open_store
from floe.store.objects.file import FileStore
from floe.store.objects.memory import MemoryStore
from floe.store.objects.retry import RetryingStore

DOWN = UnavailableError("down")


@pytest.fixture
def memory():
    store = MemoryStore()
    store.put("a", b"content")
    return store


def retrying(inner, **settings):
    return RetryingStore(inner, **{"first_pause": 0.001, "longest_pause": 0.01, "deadline": 10} | settings)


# Retries


def test_passing_faults_are_tried_again(memory):
    faulty = CountdownFailureStore(
        memory, fail_get={1: DOWN, 2: DOWN, 4: DOWN}, fail_put={1: DOWN}, fail_head={1: DOWN}, fail_delete={1: DOWN}
    )
    store = retrying(faulty)
    assert store.get("a") == b"content"
    assert asyncio.run(store.get_async("a", 1, 2)) == b"on"
    store.put("b", b"2")
    assert store.head("b").size == 1
    store.delete("b")
    assert store.get_versioned("a")[0] == b"content"
    assert faulty.calls == {"get": 6, "put": 2, "list": 0, "delete": 2, "head": 2}


@pytest.mark.parametrize("error", [NotFoundError("x"), AccessDeniedError("x"), DamagedError("x"), ConflictError("x")])
def test_lasting_faults_are_not_tried_again(memory, error):
    faulty = CountdownFailureStore(memory, fail_get={1: error})
    with pytest.raises(type(error)) as caught:
        retrying(faulty).get("a")
    assert caught.value is error
    assert faulty.calls["get"] == 1


def test_the_deadline_ends_the_retries_with_the_last_error(memory):
    store = retrying(UnreachableStore(memory), deadline=0.5)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        store.get("a")
    assert time.monotonic() - start < 10
    assert caught.value.hint
    assert store.inner.attempts > 3
    with pytest.raises(UnavailableError):
        asyncio.run(store.get_async("a", 0, 1))


def test_pauses_are_random_and_grow_and_are_longer_when_asked_to_slow_down(memory):
    store = RetryingStore(memory, first_pause=0.1, longest_pause=5, deadline=1000)
    now = time.monotonic()
    pauses = [store._pause(DOWN, attempt, now) for attempt in range(1, 30)]
    assert len({round(p, 9) for p in pauses}) == len(pauses)
    assert all(p <= min(5, 0.1 * 2**n) for n, p in enumerate(pauses, 1))
    assert max(store._pause(DOWN, 1, now) for _ in range(50)) <= 0.2
    assert all(2.5 <= store._pause(ThrottledError("slow down"), 10, now) <= 5 for _ in range(50))


def test_a_conditional_put_whose_answer_got_lost_has_still_won(memory):
    faulty = CountdownFailureStore(memory, fail_put_after={1: DOWN})
    version = retrying(faulty).put_if("ref", b"mine", None)
    assert memory.get_versioned("ref") == (b"mine", version)


def test_a_conditional_put_that_lost_while_down_has_lost(memory):
    class Rival(CountdownFailureStore):
        def put_if(self, key, data, version):
            if not self.calls["put"]:
                self.inner.put(key, b"theirs")
            return super().put_if(key, data, version)

    with pytest.raises(ConflictError):
        retrying(Rival(memory, fail_put={1: DOWN})).put_if("ref", b"mine", None)
    assert memory.get("ref") == b"theirs"


def test_a_plain_conflict_is_not_mistaken_for_a_lost_answer(memory):
    memory.put("ref", b"mine")
    with pytest.raises(ConflictError):
        retrying(memory).put_if("ref", b"mine", None)


def test_bytes_sent_again_are_not_reported_again(memory, tmp_path):
    source = tmp_path / "pack"
    source.write_bytes(bytes(1000))

    class HalfWay(MemoryStore):
        attempts = 0

        def put_file(self, key, path, progress=None):
            self.attempts += 1
            for _ in range(5 if self.attempts < 3 else 10):
                progress(100)
            if self.attempts < 3:
                raise DOWN
            self.put(key, path.read_bytes())

    reported = []
    retrying(HalfWay()).put_file("packs/x", source, reported.append)
    assert reported == [100] * 10


def test_a_listing_that_breaks_off_is_completed_without_repeating(memory):
    for n in range(10):
        memory.put(f"refs/{n}", b"x")

    class Breaks(MemoryStore):
        lists = 0

        def list(self, prefix):
            self.lists += 1
            for number, info in enumerate(memory.list(prefix)):
                if self.lists < 3 and number == 4 * self.lists:
                    raise DOWN
                yield info

    store = Breaks()
    assert [i.key for i in retrying(store).list("refs")] == [f"refs/{n}" for n in range(10)]
    assert store.lists == 3


def test_a_silent_store_does_not_hold_a_cancelled_read(memory):
    silent = SilentStore(memory)

    async def cancel():
        task = asyncio.ensure_future(retrying(silent).get_async("a", 0, 1))
        while not silent.waiting:  # noqa: ASYNC110 - counted by other threads too
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert silent.waiting == 0


def test_requests_are_recorded(memory):
    store = RecordingStore(memory)
    store.get("a", 1, 3)
    store.put("b", b"12")
    with pytest.raises(NotFoundError):
        store.get("none")
    assert [(r.op, r.key, r.start, r.length, r.got) for r in store.requests] == [
        ("get", "a", 1, 3, 3),
        ("put", "b", 0, None, 2),
    ]
    assert (store.bytes_read, store.bytes_written, store.failed) == (3, 2, 1)


# File store


@pytest.fixture
def store(tmp_path):
    opened = FileStore(tmp_path / "store")
    opened.put("refs/x", b"old")
    yield opened
    opened.close()


def temporaries(store):
    return list((store.root / ".tmp").iterdir())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EROFS, AccessDeniedError),
        (errno.EACCES, AccessDeniedError),
        (errno.EIO, UnavailableError),
    ],
)
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failing_disk_leaves_the_old_object_and_nothing_else(store, monkeypatch, code, expected, step):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, step, fail)
        for write in (
            lambda: store.put("refs/x", b"new"),
            lambda: store.put_if("refs/x", b"new", store.head("refs/x").version),
        ):
            with pytest.raises(expected, match="refs/x") as caught:
                write()
            assert caught.value.hint or expected is UnavailableError
    assert store.get("refs/x") == b"old"
    assert temporaries(store) == []


def test_a_real_full_disk(tmp_path):
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "floe-test", str(mountpoint)], check=True)
    try:
        full = FileStore(mountpoint / "store")
        full.put("small", b"1")
        source = tmp_path / "large"
        source.write_bytes(bytes(4 << 20))
        for write in (lambda: full.put("large", bytes(4 << 20)), lambda: full.put_file("large", source)):
            with pytest.raises(NoSpaceError, match="large") as caught:
                write()
            assert "free" in caught.value.hint
        assert temporaries(full) == []
        assert [i.key for i in full.list("")] == ["small"]
        full.put("small", b"2")
        full.close()
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_what_nobody_may_read_is_denied():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        FileStore(Path(folder) / "store").put("floe.json", b"{}")
        assert stat.S_IMODE((Path(folder) / "store").stat().st_mode) == 0o700
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from floe.store.objects.file import FileStore\n"
            "from floe.store.errors import AccessDeniedError\n"
            "store = FileStore(Path(sys.argv[1]))\n"
            "for use in (lambda: store.get('floe.json'), lambda: store.put('x', b''), lambda: list(store.list('')),\n"
            "            lambda: store.put_if('x', b'', None), lambda: store.head('floe.json')):\n"
            "    try:\n"
            "        use()\n"
            "    except AccessDeniedError as error:\n"
            "        assert sys.argv[1] in error.hint\n"
            "        print('denied')\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, f"{folder}/store"],
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert run.stdout.split() == ["denied"] * 5, run.stderr


def test_a_store_that_does_not_exist_says_so_and_is_not_made_by_reading(tmp_path):
    store = open_store(f"file://{tmp_path}/none")
    for use in (lambda: store.get("floe.json"), lambda: store.head("x"), lambda: list(store.list("refs"))):
        with pytest.raises(NotFoundError, match="does not exist") as caught:
            use()
        assert "push a model" in caught.value.hint
    store.delete("x")
    assert not (tmp_path / "none").exists()


def test_a_folder_where_an_object_should_be(store):
    store.put("a/b", b"x")
    with pytest.raises(PreconditionError, match="a in "):
        store.put("a", b"x")
    with pytest.raises(PreconditionError, match="a/b/c"):
        store.put("a/b/c", b"x")
    assert temporaries(store) == []


def test_leftovers_of_a_crash_are_invisible_and_swept_at_once(store):
    for name in ("crashed", "living"):
        (store.root / ".tmp" / name).write_bytes(b"half")
    assert [i.key for i in store.list("")] == ["refs/x"]
    with (store.root / ".tmp" / "living").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        FileStore(store.root).close()
    assert [p.name for p in temporaries(store)] == ["living"]


def test_nothing_is_swept_while_a_writer_may_be_about_to_lock_its_file(store):
    (store.root / ".tmp" / "new").write_bytes(b"half")
    with (store.root / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        FileStore(store.root).close()
    assert [p.name for p in temporaries(store)] == ["new"]
    FileStore(store.root).close()
    assert temporaries(store) == []


def test_a_folder_removed_under_a_writer_is_made_again(store):
    store.put("deep/er/x", b"1")
    (store.root / "deep/er/x").unlink()
    (store.root / "deep/er").rmdir()
    store.put("deep/er/x", b"2")
    assert store.get("deep/er/x") == b"2"


def test_a_store_removed_under_a_writer_is_made_again(store):
    shutil.rmtree(store.root)
    with pytest.raises(NotFoundError, match="does not exist"):
        store.get("refs/x")
    store.put("refs/x", b"2")
    assert store.get("refs/x") == b"2"


def test_readers_never_see_half_an_object(store):
    done = threading.Event()
    wrong = []

    def read():
        while not done.is_set():
            data = store.get("refs/x")
            if len(set(data)) > 1 and data != b"old":
                wrong.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(100):
        store.put("refs/x", bytes([n]) * 100_000)
    done.set()
    reader.join()
    assert wrong == []


# S3


@pytest.fixture
def aws(monkeypatch):
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(
    ("answer", "expected", "says"),
    [
        (
            "503 Slow Down\r\n|<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>",
            ThrottledError,
            "SlowDown",
        ),
        ("429 Too Many\r\n|", ThrottledError, "429"),
        ("500 Oops\r\n|<Error><Code>InternalError</Code></Error>", UnavailableError, "InternalError"),
        (
            "403 No\r\n|<Error><Code>ExpiredToken</Code><Message>Old.</Message></Error>",
            CredentialsExpiredError,
            "ExpiredToken: Old",
        ),
        ("400 Bad\r\n|<Error><Code>ExpiredToken</Code></Error>", CredentialsExpiredError, "ExpiredToken"),
        ("404 None\r\n|<Error><Code>NoSuchKey</Code></Error>", NotFoundError, "no object x"),
    ],
)
def test_what_servers_answer_becomes_what_floe_raises(answer, expected, says):
    status, _, body = answer.partition("|")
    reply = f"HTTP/1.1 {status}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    peer.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{server.getsockname()[1]}&region=r", retry=False)
        with pytest.raises(expected, match=says) as caught:
            store.get("x", 0, 10)
        assert type(caught.value) is expected
        assert "\n" not in str(caught.value)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.usefixtures("aws")
def test_a_read_from_a_server_that_never_answers_can_be_cancelled():
    with socket.create_server(("127.0.0.1", 0)) as server:
        store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{server.getsockname()[1]}&region=r")

        async def cancel():
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(store.get_async("x", 0, 10), 0.2)

        start = time.monotonic()
        asyncio.run(cancel())
        assert time.monotonic() - start < 15  # of a request's own deadlines, half a minute


@pytest.mark.slow
def test_a_server_that_dies_during_an_upload(tmp_path, monkeypatch):
    weed = Seaweed(tmp_path / "weed")
    try:
        for name, value in weed.environment().items():
            monkeypatch.setenv(name, value)
        store = open_store(weed.url(weed.bucket()), retry=False)
        store.put("a", b"1")
        source = tmp_path / "pack"
        source.write_bytes(bytes(48 << 20))
        with pytest.raises(UnavailableError, match="packs/x"):
            store.put_file("packs/x", source, lambda _: weed.stop())
        with pytest.raises(UnavailableError):
            store.get("a")
    finally:
        weed.stop()


def test_a_sweep_is_logged(store, caplog):
    (store.root / ".tmp" / "crashed").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        FileStore(store.root).close()
    assert "crashed" in caplog.text


def test_versions_do_not_hang_on_the_kernels_coarse_clock(store):
    # Some kernels stamp everything within 4 ms alike, and inodes are used again: then two contents would look the same.
    for n in range(50):
        before = time.time_ns()
        store.put("refs/x", b"%03d" % n)
        assert before <= (store.root / "refs/x").stat().st_mtime_ns <= time.time_ns()
