"""A real S3 server behind a proxy with every named fault, under both ways of reading: right bytes in time, or an error alone.

"small" reads go through obstore, "large" ones through http_ranges.py as far as that gets, then through obstore too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from support import seaweed
from support.certificates import Authority
from support.faultproxy import FAULTS, FaultProxy, impatient_proxy
from support.packs import make_pack, random_content
from support.reading import read, submit

from floe.fuse.pack_reader import PackReader
from floe.store import layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import (
    DamagedError,
    DeadlineError,
    NotFoundError,
)
from floe.store.objects import open_store

MIB = 1 << 20
FRAME = 128 << 10
SIZES = {"small": FRAME, "large": 2 * MIB}
SOME_SIZES = (pytest.param(SIZES["small"], marks=pytest.mark.slow), SIZES["large"])
SILENCE = 0.5  # seconds without a byte before a request is given up
DEADLINE = 1.5  # of a read, in seconds
# What a fault that lasts makes of a read: the error, and what the message says of the cause.
LASTING = {
    "http_500": (DeadlineError, "InternalError"),
    "slow_down_503": (DeadlineError, "asks to be used less"),
    "clock_skew": (DeadlineError, "whose clock differs"),
    "expired_token": (DeadlineError, "no longer accepted"),
    "vanished": (NotFoundError, "no object"),
    "reset_before_answer": (DeadlineError, "cannot read"),
    "lost_answer": (DeadlineError, "cannot read"),
    "reset_mid_body": (DeadlineError, "cannot read"),
    "stall_before_answer": (DeadlineError, "did not arrive"),
    "stall_mid_body": (DeadlineError, "did not arrive"),
    "closed_mid_body": (DeadlineError, "cannot read"),
    "short_body": (DamagedError, "does not match"),
    "flipped_bit": (DamagedError, "does not match"),
    "wrong_range": (DeadlineError, "cannot read"),
    "whole_object": (DeadlineError, "cannot read"),
}


@pytest.fixture
def proxy(monkeypatch):
    with impatient_proxy(monkeypatch, SILENCE) as made:
        yield made


@pytest.fixture(autouse=True)
def credentials(proxy):
    """All of these tests need what `proxy` sets."""


class Place:
    """Packs in a prefix of their own, and readers of them through `url`."""

    def __init__(self, folder):
        self.prefix = f"faulty/{uuid.uuid4().hex}"
        self.store = open_store(seaweed.running().url(seaweed.shared_bucket(), self.prefix))
        self.writer = CacheWriter(NodeCache(folder / "cache"))
        self.readers = []

    def address(self, endpoint):
        return seaweed.running().url(seaweed.shared_bucket(), self.prefix, endpoint=endpoint)

    def pack(self, seed, size=4 * MIB):
        pack = make_pack(random_content(size, seed), FRAME).publish(self.store)
        self.writer.cache.add_index(pack.id, pack.index.encode())
        return pack

    def reader(self, url, *, deadline=DEADLINE):
        store = open_store(url, retry=False)
        made = PackReader(store, self.writer, readahead=0, deadline=deadline, damage_memory=0.05)
        self.readers.append((made, store))
        return made

    def close(self):
        for reader, store in self.readers:
            reader.close()
            store.close()
        self.writer.close()
        self.store.close()


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_fault_that_passes_is_not_seen(place, proxy, size):
    packs = {fault: place.pack(fault) for fault in FAULTS if fault != "vanished"}
    reader = place.reader(place.address(proxy.url), deadline=20)
    faults = {fault: proxy.fault(fault, matches=pack.id, times=1) for fault, pack in packs.items()}
    answers = {fault: submit(reader, pack.id, MIB, size) for fault, pack in packs.items()}
    told = {fault: answer.wait() for fault, answer in answers.items()}
    wrong = {f: e for f, e in told.items() if e != packs[f].content[MIB : MIB + size]}
    assert wrong == {}
    assert [fault for fault, made in faults.items() if not made.hits] == []
    assert reader.counters()["failed_reads"] == 0


@pytest.mark.parametrize("size", SOME_SIZES, ids=SIZES)
def test_a_fault_that_lasts_fails_its_reads_alone_and_in_time(place, proxy, size):
    assert set(LASTING) == set(FAULTS)
    packs = {fault: place.pack(f"lasting {fault}") for fault in FAULTS}
    good = place.pack("good")
    reader = place.reader(place.address(proxy.url))
    assert read(reader, good.id, 0, FRAME) == good.content[:FRAME]  # the credentials are good ones
    for fault, pack in packs.items():
        proxy.fault(fault, matches=pack.id)
    began = time.monotonic()
    answers = {fault: submit(reader, pack.id, MIB, size) for fault, pack in packs.items()}
    assert read(reader, good.id, MIB, size) == good.content[MIB : MIB + size]
    told = {fault: answer.wait() for fault, answer in answers.items()}
    took = time.monotonic() - began
    seen = {f: (type(e), LASTING[f][1] if LASTING[f][1] in str(e) else str(e)) for f, e in told.items()}
    assert seen == LASTING
    assert took < DEADLINE + 5
    assert all(e.hint for e in told.values() if not isinstance(e, NotFoundError))
    proxy.heal()
    time.sleep(0.06)  # damage was believed in for 50 ms
    wrong = [f for f, pack in packs.items() if read(reader, pack.id, MIB, size) != pack.content[MIB : MIB + size]]
    assert wrong == []


def test_a_pack_that_was_deleted_is_read_again_once_it_is_back(place, proxy):
    pack = place.pack("deleted")
    reader = place.reader(place.address(proxy.url))
    assert read(reader, pack.id, 0, FRAME) == pack.content[:FRAME]
    place.store.delete(layout.pack_key(pack.id))
    for size in SIZES.values():
        assert isinstance(submit(reader, pack.id, MIB, size).wait(), NotFoundError)
    assert read(reader, pack.id, 0, FRAME) == pack.content[:FRAME]  # it is here
    pack.publish(place.store)
    assert read(reader, pack.id, MIB, 2 * MIB) == pack.content[MIB : 3 * MIB]


@pytest.mark.parametrize("size", SOME_SIZES, ids=SIZES)
def test_refused_connections(place, proxy, size):
    pack = place.pack("refused")
    reader = place.reader(place.address(proxy.url))
    proxy.refuse()
    error = submit(reader, pack.id, 0, size).wait()
    assert isinstance(error, DeadlineError)
    assert "connection refused" in str(error)
    patient = place.reader(place.address(proxy.url), deadline=20)
    waits = submit(patient, pack.id, MIB, size)
    proxy.listen()
    assert waits.wait() == pack.content[MIB : MIB + size]
    assert read(reader, pack.id, 0, size) == pack.content[:size]


def test_connections_that_are_reset_all_at_once(place, proxy):
    pack = place.pack("reset")
    reader = place.reader(place.address(proxy.url), deadline=20)
    assert read(reader, pack.id, 0, MIB) == pack.content[:MIB]
    proxy.reset()  # those that are kept
    assert read(reader, pack.id, MIB, 3 * MIB) == pack.content[MIB:]


@pytest.mark.parametrize("size", SOME_SIZES, ids=SIZES)
def test_tls_that_fails(place, tmp_path, size):
    authority = Authority(tmp_path / "ca")
    pack = place.pack("tls")
    with FaultProxy(seaweed.running().endpoint, authority.server("127.0.0.1")) as proxy:
        untrusted = place.reader(place.address(proxy.url))
        reader = place.reader(f"{place.address(proxy.url)}&ca={authority.ca}")
        error = submit(untrusted, pack.id, 0, size).wait()
        assert isinstance(error, DeadlineError)
        assert "certificate" in str(error)
        proxy.garbles_tls = True
        assert isinstance(submit(reader, pack.id, 0, size).wait(), DeadlineError)
        proxy.garbles_tls = False
        assert read(reader, pack.id, 0, size) == pack.content[:size]


_RESOLVING = """
import contextlib
import sys
from pathlib import Path
from support.reading import read, submit
from floe.fuse.pack_reader import PackReader
from floe.store.cache import CacheWriter, NodeCache
from floe.store.objects import open_store

cache, url, pack = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with contextlib.closing(CacheWriter(NodeCache(cache))) as writer:
    reader = PackReader(open_store(url, retry=False), writer, readahead=0, deadline=1.0)
    print(submit(reader, pack, 0, 1 << 20).wait(), flush=True)
    sys.stdin.readline()
    print(len(read(reader, pack, 0, 1 << 20)), flush=True)
    reader.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a private /etc/hosts needs root")
def test_a_name_that_does_not_resolve_until_it_does(tmp_path):
    place = Place(tmp_path)
    try:
        pack = place.pack("name")
    finally:
        place.close()
    hosts, resolvers = tmp_path / "hosts", tmp_path / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n")
    resolvers.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    endpoint = seaweed.running().endpoint.replace("127.0.0.1", "store.floe.invalid")
    binds = f'mount --bind {hosts} /etc/hosts && mount --bind {resolvers} /etc/resolv.conf && exec "$@"'
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        binds,
        "sh",
        sys.executable,
        "-c",
        _RESOLVING,
    ]
    child = subprocess.Popen(
        [*command, str(tmp_path / "cache"), place.address(endpoint), pack.id],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", "."])}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    with child:
        assert "the host's name cannot be resolved" in child.stdout.readline()
        with hosts.open("a") as file:
            file.write("127.0.0.1 store.floe.invalid\n")
        child.stdin.write("go\n")
        child.stdin.flush()
        assert int(child.stdout.readline()) == MIB
    assert child.returncode == 0
