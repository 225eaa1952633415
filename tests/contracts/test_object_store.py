"""What every object store promises: one suite over memory, file, a real S3 server and Google's API, with retries or without."""

import asyncio
import contextlib
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support import seaweed
from support.fakegcs import FakeGCS

from floe.store.errors import BadInputError, ConflictError, DamagedError, FloeError, NotFoundError, SourceChangedError
from floe.store.objects import keys, open_store
from floe.store.objects.retry import RetryingStore


@pytest.fixture(scope="module")
def gcs():
    with FakeGCS() as server:
        yield server


@pytest.fixture(params=["memory", "memory-retry", "file", "file-retry", "s3", "s3-retry", "gs", "gs-retry"])
def store(request, tmp_path, monkeypatch):
    kind, _, retry = request.param.partition("-")
    if kind == "s3":
        weed = seaweed.running()
        for name, value in weed.environment().items():
            monkeypatch.setenv(name, value)
        url = weed.url(seaweed.shared_bucket(), f"some/{uuid.uuid4().hex}")
    elif kind == "gs":
        server = request.getfixturevalue("gcs")
        url = server.address(server.bucket(), "some/where")
    else:
        url = {"memory": "memory://", "file": f"file://{tmp_path}/a/store"}[kind]
    opened = open_store(url, retry=bool(retry))
    assert isinstance(opened, RetryingStore) == bool(retry)
    opened.put("started", b"")  # a file store begins with its first write
    yield opened
    opened.close()


def names(store, prefix=""):
    return sorted(info.key for info in store.list(prefix))


def test_get_returns_what_was_put(store):
    for data in (b"", b"x", bytes(range(256)) * 1000):
        store.put("packs/ab/cd", data)
        assert bytes(store.get("packs/ab/cd")) == data
    store.put("view", memoryview(bytearray(b"hello"))[1:4])
    assert bytes(store.get("view")) == b"ell"


def test_what_is_too_large_is_not_read_whole(store, monkeypatch):
    monkeypatch.setattr(keys, "WHOLE_MAX", 1000)
    store.put("trees/ab/fits", bytes(1000))
    store.put("trees/ab/large", bytes(1001))
    assert len(store.get("trees/ab/fits")) == len(store.get_versioned("trees/ab/fits")[0]) == 1000
    for read in (store.get, store.get_versioned):
        with pytest.raises(DamagedError, match="read whole"):
            read("trees/ab/large")
    assert len(store.get("trees/ab/large", 1, 1000)) == 1000


def test_ranges_are_read_into_the_callers_memory(store):
    data = os.urandom(300_000)
    store.put("packs/ab/obj", data)
    for start, lengths in ((0, (300_000,)), (1, (1, 70_000, 5, 200_000)), (299_999, (1,))):
        opened = store.open_range("packs/ab/obj", start, sum(lengths))
        at = start
        for length in lengths:
            memory = bytearray(length + 2)
            opened.readinto(memoryview(memory)[1:-1])
            assert memory == b"\0" + data[at : at + length] + b"\0"
            at += length
        opened.close()


def test_a_range_may_be_left_in_the_middle(store):
    data = os.urandom(3 << 20)
    store.put("packs/ab/obj", data)
    opened = store.open_range("packs/ab/obj", 0, len(data))
    opened.readinto(memoryview(bytearray(10)))
    opened.abort()
    opened.close()
    memory = bytearray(100)
    again = store.open_range("packs/ab/obj", 50, 100)
    again.readinto(memoryview(memory))
    again.close()
    assert memory == data[50:150]


def test_a_range_that_is_not_there_is_refused(store):
    store.put("packs/ab/obj", b"x" * 100)
    for key, start, length in (("packs/ab/obj", 50, 51), ("packs/ab/none", 0, 1)):
        with pytest.raises(FloeError), contextlib.closing(store.open_range(key, start, length)) as opened:
            opened.readinto(memoryview(bytearray(length)))


def test_ranges_are_exact(store):
    data = os.urandom(100_000)
    store.put("obj", data)
    for start, length in ((0, 1), (0, 100_000), (99_999, 1), (4096, 8192), (100_000, 0), (5, 0)):
        assert bytes(store.get("obj", start, length)) == data[start : start + length]
        assert bytes(asyncio.run(store.get_async("obj", start, length))) == data[start : start + length]
    assert bytes(store.get("obj", 99_990)) == data[99_990:]
    assert bytes(store.get("obj", 100_000)) == b""


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 1), (5000, 5000)])
def test_a_range_past_the_end_is_an_error_never_short(store, start, length):
    store.put("obj", b"0123456789")
    with pytest.raises(DamagedError, match="obj"):
        store.get("obj", start, length)
    with pytest.raises(DamagedError, match="obj"):
        asyncio.run(store.get_async("obj", start, length))


def test_a_start_past_the_end_is_an_error(store):
    store.put("obj", b"0123456789")
    with pytest.raises(DamagedError):
        store.get("obj", 11)


def test_a_negative_range_is_refused(store):
    store.put("obj", b"0123456789")
    for start, length in ((-1, 1), (0, -1)):
        with pytest.raises(BadInputError):
            store.get("obj", start, length)


def test_what_is_not_there_is_not_found(store):
    for read in (
        lambda: store.get("no/such"),
        lambda: store.get("no/such", 0, 1),
        lambda: asyncio.run(store.get_async("no/such", 0, 1)),
        lambda: store.get_versioned("no/such"),
        lambda: store.head("no/such"),
    ):
        with pytest.raises(NotFoundError, match="no/such"):
            read()


def test_a_folder_is_not_an_object(store):
    store.put("refs/models/a", b"x")
    for key in ("refs", "refs/models"):
        with pytest.raises(NotFoundError):
            store.get(key)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.tmp/b", ".lock", "a\0b", "a b", "é", "a" * 256]
)
def test_keys_that_could_escape_are_refused(store, key, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    for use in (
        lambda: store.get(key),
        lambda: asyncio.run(store.get_async(key, 0, 1)),
        lambda: store.get_versioned(key),
        lambda: store.head(key),
        lambda: store.put(key, b"x"),
        lambda: store.put_file(key, source),
        lambda: store.put_if(key, b"x", None),
        lambda: store.delete(key),
    ):
        with pytest.raises(BadInputError):
            use()
    if key not in ("", "a/"):
        with pytest.raises(BadInputError):
            list(store.list(key))


def test_head_and_list_agree(store):
    store.put("refs/x", b"12345")
    head = store.head("refs/x")
    (listed,) = store.list("refs")
    assert replace(head, modified=0.0) == replace(listed, modified=0.0)
    assert abs(head.modified - listed.modified) <= 1.0  # HTTP's dates are whole seconds, a listing's may be finer
    assert (head.key, head.size) == ("refs/x", 5)
    assert store.get_versioned("refs/x") == (b"12345", head.version)


def test_list_gives_whole_folders_only(store):
    for key in ("refs/models/_/a/1", "refs/models/_/ab/1", "refs/modelsx", "refs/models/o/a/2", "packs/aa/1"):
        store.put(key, b"x")
    assert names(store, "refs/models") == ["refs/models/_/a/1", "refs/models/_/ab/1", "refs/models/o/a/2"]
    assert names(store, "refs/models/") == names(store, "refs/models")
    assert names(store, "refs/models/_/a") == ["refs/models/_/a/1"]
    assert names(store, "nothing/here") == []
    assert len(names(store)) == 6


def test_put_replaces(store):
    store.put("a", b"long before")
    store.put("a", b"new")
    assert bytes(store.get("a")) == b"new"
    assert store.head("a").size == 3


def test_delete_and_delete_again(store):
    store.put("refs/x", b"1")
    store.delete("refs/x")
    store.delete("refs/x")
    store.delete("never/was")
    with pytest.raises(NotFoundError):
        store.get("refs/x")
    assert names(store, "refs") == []


def test_put_if_creates_only_what_is_new(store):
    version = store.put_if("floe.json", b"one", None)
    assert store.get_versioned("floe.json") == (b"one", version)
    with pytest.raises(ConflictError):
        store.put_if("floe.json", b"two", None)
    assert bytes(store.get("floe.json")) == b"one"


def test_put_if_replaces_only_the_version_it_names(store):
    first = store.put_if("ref", b"one", None)
    second = store.put_if("ref", b"two", first)
    assert second != first
    with pytest.raises(ConflictError):
        store.put_if("ref", b"three", first)
    store.put("ref", b"four")
    with pytest.raises(ConflictError):
        store.put_if("ref", b"five", second)
    assert bytes(store.get("ref")) == b"four"
    store.put_if("ref", b"six", store.head("ref").version)
    assert bytes(store.get("ref")) == b"six"


def test_put_if_of_what_was_removed_conflicts(store):
    version = store.put_if("ref", b"one", None)
    store.delete("ref")
    with pytest.raises(ConflictError):
        store.put_if("ref", b"two", version)
    with pytest.raises(NotFoundError):
        store.get("ref")


def test_of_many_writers_one_creates(store):
    start = threading.Barrier(8)

    def create(number):
        start.wait()
        try:
            store.put_if("ref", b"%d" % number, None)
        except ConflictError:
            return None
        return b"%d" % number

    with ThreadPoolExecutor(8) as pool:
        winners = [w for w in pool.map(create, range(8)) if w is not None]
    assert len(winners) == 1
    assert bytes(store.get("ref")) == winners[0]


def test_no_increment_is_lost_between_writers(store):
    store.put("count", b"0")

    def add(_):
        for _ in range(5):
            while True:
                data, version = store.get_versioned("count")
                try:
                    store.put_if("count", b"%d" % (int(data) + 1), version)
                except ConflictError:
                    continue
                break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert bytes(store.get("count")) == b"20"


@pytest.mark.parametrize("size", [0, 1000, (8 << 20) + 1, 20_000_003])
def test_put_file_stores_the_file_and_reports_all_bytes_once(store, tmp_path, size):
    content = os.urandom(min(size, 1 << 20)) * (size // (1 << 20) + 1)
    source = tmp_path / "pack"
    source.write_bytes(content[:size])
    reported = []
    store.put_file("packs/aa/pack", source, reported.append)
    assert sum(reported) == size
    assert all(count > 0 for count in reported)
    assert store.head("packs/aa/pack").size == size
    assert bytes(store.get("packs/aa/pack")) == content[:size]
    store.put_file("packs/aa/pack", source)


def test_put_file_of_a_missing_file_stores_nothing(store, tmp_path):
    with pytest.raises(NotFoundError, match="no-such-file"):
        store.put_file("packs/aa/x", tmp_path / "no-such-file")
    assert names(store, "packs") == []


def test_put_file_of_a_shrinking_file_stores_nothing(store, tmp_path):
    if store.url == "memory://":
        return  # it reads the file at once
    source = tmp_path / "pack"
    source.write_bytes(bytes(40 << 20))

    def shrink(_):
        os.truncate(source, 17 << 20)

    with pytest.raises(SourceChangedError, match="pack"):
        store.put_file("packs/aa/x", source, shrink)
    assert names(store, "packs") == []


def test_hundreds_of_reads_wait_at_once(store):
    data = os.urandom(1 << 20)
    store.put("pack", data)

    async def read_all():
        reads = [store.get_async("pack", n * 1024, 1024) for n in range(300)]
        return await asyncio.gather(*reads)

    assert b"".join(map(bytes, asyncio.run(read_all()))) == data[: 300 * 1024]


def test_a_cancelled_read_leaves_the_store_usable(store):
    store.put("pack", bytes(8 << 20))

    async def cancel_then_read():
        task = asyncio.ensure_future(store.get_async("pack", 0, 8 << 20))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await store.get_async("pack", 1, 2)

    assert bytes(asyncio.run(cancel_then_read())) == b"\0\0"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/var/lib/floe", "scheme"),
        ("ftp://bucket", "unknown kind"),
        ("gs://", "bucket"),
        ("gs://UPPER", "bucket"),
        ("gs://bucket/a/../b", "not valid"),
        ("gs://bucket?region=a", "region"),
        ("gs://bucket?endpoint=ftp://x", "ftp"),
        ("gs://bucket?service_account=key.json", "absolute"),
        ("gs://bucket?service_account=/no/such/key.json", "cannot read"),
        ("s3://bucket?ca=relative.pem", "absolute"),
        ("s3://bucket?ca=/no/such/ca.pem", "cannot read"),
        ("file://relative/path", "file:///"),
        ("file:///a/../b", "file:///"),
        ("file:///a?x=1", "file:///"),
        ("s3://", "bucket"),
        ("s3://UPPER", "bucket"),
        ("s3://bucket?endpont=http://x", "endpont"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?path_style=maybe", "path_style"),
        ("s3://bucket?endpoint=ftp://x", "ftp"),
        ("s3://bucket/a/../b", "not valid"),
        ("memory://name", "unknown kind"),
    ],
)
def test_addresses_that_are_refused(url, says):
    with pytest.raises(BadInputError, match=says):
        open_store(url)


def test_objects_tell_when_they_were_written(store):
    store.put("first", b"1")
    first = store.head("first").modified
    (listed,) = [info.modified for info in store.list("") if info.key == "first"]
    assert abs(listed - first) < 1  # in one of the two some servers tell whole seconds
    assert abs(first - time.time()) < 60  # the servers of the tests run here
    store.put("second", b"2")
    while store.head("second").modified <= first:
        time.sleep(0.2)
        store.put("second", b"2")
