"""Large files to a bucket, over S3 and Google's API: resumed after a kill, checked before a part is used again, bounded."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from support import seaweed
from support.fakegcs import FakeGCS
from support.s3gate import S3Gate

from floe.store.errors import CancelledError, SourceChangedError, UnavailableError
from floe.store.objects import multipart, open_store

PART = multipart.PART
CHILD = """
import sys
from pathlib import Path
from floe.store.objects import open_store
open_store(sys.argv[1]).put_file(sys.argv[2], Path(sys.argv[3]))
"""


class Place:
    """A server of either kind, and one fresh store on it."""

    def __init__(self, server, url, bucket, prefix):
        self.server, self.url, self.prefix = server, url, prefix
        self.store = open_store(url, retry=False)
        self.uploads = self.store.multipart.uploads

    def arrivals(self, key):
        """Part number -> how often it arrived whole."""
        full = f"{self.prefix}/{key}"
        return {number: count for (name, number), count in self.server.parts.items() if name == full}


@pytest.fixture(scope="module")
def servers():
    weed = seaweed.running()
    with S3Gate(weed, {seaweed.ACCESS_KEY: None}) as gate, FakeGCS() as google:
        yield {"s3": (gate, seaweed.shared_bucket()), "gs": (google, google.bucket())}


@pytest.fixture(params=["s3", "gs"])
def place(request, servers, monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    server, bucket = servers[request.param]
    prefix = f"uploads/{uuid.uuid4().hex}"
    server.denied = set()
    made = Place(server, server.address(bucket, prefix), bucket, prefix)
    yield made
    server.before = lambda *_: None
    server.denied = set()
    made.store.close()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pack"
    path.write_bytes(os.urandom(1 << 20) * 20 + b"the end")  # three parts
    return path


def begin(place, key, source, numbers):
    """An upload of which these parts are there."""
    upload = place.uploads.create(key)
    data = source.read_bytes()
    for number in numbers:
        body = multipart.Body(data[(number - 1) * PART : number * PART])
        place.uploads.put(key, upload, number, body)
    return upload


def test_what_is_there_is_not_sent_again(place, source):
    upload = begin(place, "packs/aa/x", source, [1, 3])
    reported = []
    place.store.put_file("packs/aa/x", source, reported.append)
    assert place.arrivals("packs/aa/x") == {1: 1, 2: 1, 3: 1}
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()
    assert sum(reported) == source.stat().st_size
    assert upload not in [known.id for known in place.uploads.find("packs/aa/x")]


def test_a_part_with_other_bytes_is_sent_again(place, source, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(os.urandom(PART) + source.read_bytes()[PART:])
    begin(place, "packs/aa/x", other, [1, 2])
    place.store.put_file("packs/aa/x", source)
    assert place.arrivals("packs/aa/x") == {1: 2, 2: 1, 3: 1}
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()


def test_the_upload_that_has_most_is_gone_on_with(place, source):
    begin(place, "packs/aa/x", source, [1, 2])
    begin(place, "packs/aa/x", source, [3])
    place.store.put_file("packs/aa/x", source)
    assert sum(place.arrivals("packs/aa/x").values()) == 4
    assert len(place.uploads.find("packs/aa/x")) == 1  # the other is young, and may be somebody's


def test_a_key_that_only_begins_alike_is_left_alone(place, source):
    other = begin(place, "packs/aa/xy", source, [1, 2])
    place.store.put_file("packs/aa/x", source)
    assert place.arrivals("packs/aa/x") == {1: 1, 2: 1, 3: 1}
    assert [known.id for known in place.uploads.find("packs/aa/xy")] == [other]


def test_uploads_that_nobody_went_on_with_for_days_are_dropped(place, source, monkeypatch):
    begin(place, "packs/bb/old", source, [1])
    elsewhere = begin(place, "other/old", source, [1])
    monkeypatch.setattr(multipart, "ABANDONED", timedelta(seconds=-60))
    place.store.put_file("packs/aa/x", source)
    assert place.uploads.find("packs/bb/old") == []
    assert [known.id for known in place.uploads.find("other/old")] == [elsewhere]
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()


@pytest.mark.parametrize(
    "denied",
    [
        {"s3:ListBucketMultipartUploads", "storage.multipartUploads.list"},
        {"s3:ListMultipartUploadParts", "storage.multipartUploads.listParts"},
    ],
)
def test_who_may_not_ask_what_is_there_sends_all(place, source, denied):
    begin(place, "packs/aa/x", source, [1])
    place.server.denied = denied
    place.store.put_file("packs/aa/x", source)
    assert place.arrivals("packs/aa/x") == {1: 2, 2: 1, 3: 1}
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()


def test_an_upload_dropped_by_somebody_else_is_begun_anew(place, source):
    dropped = threading.Event()
    one_at_a_time = threading.Lock()  # parts arrive at once: the second to abort would fail, and its connection with it

    def drop(action, _):
        if action not in ("s3:PutObject", "storage.multipartUploads.create"):
            return
        with one_at_a_time:
            found = [] if dropped.is_set() else place.uploads.find("packs/aa/x")
            for known in found:
                place.uploads.abort(known.key, known.id)
                dropped.set()

    place.server.before = drop
    with pytest.raises(UnavailableError, match="by somebody else"):
        place.store.put_file("packs/aa/x", source)
    place.server.before = lambda *_: None
    dropped.clear()
    place.server.before = drop
    retrying = open_store(place.url)
    retrying.put_file("packs/aa/x", source)
    retrying.close()
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()


def test_a_source_that_changed_leaves_no_upload(place, source):
    with pytest.raises(SourceChangedError, match="pack"):
        place.store.put_file("packs/aa/x", source, lambda _: os.truncate(source, PART))
    assert place.uploads.find("packs/aa/x") == []
    assert list(place.store.list("packs")) == []


def test_who_stops_does_not_wait_and_the_next_goes_on(place, source):
    def stop(_):
        raise CancelledError("enough")

    with pytest.raises(CancelledError, match="enough"):
        place.store.put_file("packs/aa/x", source, stop)
    assert len(place.uploads.find("packs/aa/x")) == 1
    place.store.put_file("packs/aa/x", source)
    assert set(place.arrivals("packs/aa/x").values()) == {1}
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()


def test_killed_at_any_point_an_upload_is_gone_on_with(place, tmp_path):
    """Killed at the first request, at a later one the next time, and so on; then it is left to finish."""
    source = tmp_path / "pack"
    source.write_bytes(os.urandom(1 << 20) * 75 + b"the end")  # ten parts
    for step in (1, 4, 6):
        left = [step]
        lock = threading.Lock()
        # 3.10 to 3.12 disagree on whether a child may inherit threads: this one is a program of its own.
        child = subprocess.Popen([sys.executable, "-c", CHILD, place.url, "packs/aa/x", str(source)])

        def kill(*_, left=left, lock=lock, child=child):
            with lock:
                left[0] -= 1
                if not left[0]:
                    child.send_signal(signal.SIGKILL)

        place.server.before = kill
        child.wait(60)
        place.server.before = lambda *_: None
        place.server.settle()
    place.store.put_file("packs/aa/x", source)
    arrived = place.arrivals("packs/aa/x")
    assert set(arrived) == set(range(1, 11))
    assert sum(arrived.values()) <= 11, "more than one part was stored twice"
    assert bytes(place.store.get("packs/aa/x")) == source.read_bytes()
    assert place.uploads.find("packs/aa/x") == []


class _Server:
    """Uploads in memory, with SHA-256 instead of MD5, that remembers how many parts were on their way at once."""

    def __init__(self):
        self.stored, self.sent, self.now, self.most = {}, [], 0, 0
        self.full, self.lock = threading.Event(), threading.Lock()

    def find(self, prefix):
        return [multipart.Upload(prefix, "1", multipart.datetime.now(multipart.timezone.utc))] if self.stored else []

    def create(self, _):
        return "1"

    def parts(self, *_):
        return list(self.stored.values())

    def put(self, _key, _upload, number, body):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == multipart.AT_ONCE:
                self.full.set()
        assert self.full.wait(30)
        with self.lock:
            self.now -= 1
            self.sent.append(number)
            self.stored[number] = multipart.StoredPart(number, body.size, "opaque", body.sha256())
        return self.stored[number]

    def complete(self, _key, _upload, parts):
        self.completed = [part.number for part in parts]

    def abort(self, *_):
        raise AssertionError

    def close(self):
        pass


def test_parts_with_a_sha256_are_told_by_it_and_eight_are_in_memory_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(multipart, "PART", 1 << 20)
    source = tmp_path / "pack"
    source.write_bytes(os.urandom(40 << 20))
    server = _Server()
    uploads = multipart.Multipart(lambda: server)
    with source.open("rb") as file:
        uploads.put_file("packs/aa/x", file, source)
        assert (server.most, server.completed) == (multipart.AT_ONCE, list(range(1, 41)))
        server.sent.clear()
        with source.open("r+b") as change:
            change.seek(5 << 20)
            change.write(b"other")
        uploads.put_file("packs/aa/x", file, source)
    assert server.sent == [6]


def test_a_part_is_as_large_as_it_must_be(tmp_path):
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(100 << 30)
        transfer = multipart._Transfer(_Server(), "packs/aa/x", file, Path("sparse"), None)
    assert len(transfer._numbers) <= 10_000
    assert transfer._part_size % (1 << 20) == 0
    assert transfer._part_size == 11 << 20
