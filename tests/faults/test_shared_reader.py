"""Several portable mounts of one user on one node cache: the first writes it, the others ask, and any may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read, submit
from support.stores import SilentStore, UnreachableStore

from floe.fuse.errno_map import ERRNO
from floe.fuse.portable import shared
from floe.fuse.portable.shared import SharedReader, Source
from floe.store import layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import (
    BusyError,
    DamagedError,
    DeadlineError,
    FloeError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
)
from floe.store.objects import open_store

MIB = 1 << 20


@pytest.fixture
def source(tmp_path):
    return Source(f"file://{tmp_path}/store", str(tmp_path / "cache"), 64 * MIB, 0, 0, 20.0, 16 * MIB)


@pytest.fixture
def pack(source):
    made = make_pack(random_content(4 * MIB, 1)).publish(open_store(source.url))
    NodeCache(Path(source.cache_dir)).add_index(made.id, made.index.encode())
    return made


@pytest.fixture
def readers(source, monkeypatch):
    """Makes readers, each with a store of the last given kind; closes them."""
    made = []

    def make(wrap=lambda store: store, **changes):
        monkeypatch.setattr(shared, "open_store", lambda url: wrap(open_store(url)))
        made.append(SharedReader(replace(source, **changes)))
        return made[-1]

    yield make
    for reader in reversed(made):
        reader.close()


def test_a_process_that_lets_nobody_in_is_waited_for_no_longer_than_said(readers, pack, source, monkeypatch):
    """As one that was stopped: its socket takes connections, and nobody answers on it."""
    monkeypatch.setattr(shared, "_GREETING", 0.2)
    monkeypatch.setattr(shared, "_JOIN", 1.0)
    writer = CacheWriter(NodeCache(Path(source.cache_dir)))
    listener = shared._listen(Path(source.cache_dir))
    try:
        with pytest.raises(BusyError):
            readers()
    finally:
        listener.close()
        writer.close()


def test_guests_read_what_the_writer_caches(readers, pack, source):
    first, second, third = readers(), readers(), readers()
    for reader in (second, first, third):
        assert reader.lookup(pack.id) == 4 * MIB
        assert read(reader, pack.id, 5, 3 * MIB) == pack.content[5 : 5 + 3 * MIB]
    wait_until(lambda: 3 * MIB <= first.counters()["kept_held_bytes"] <= 4 * MIB)  # written behind the readers
    answers = [submit(reader, pack.id, n * 1000, 70_000) for n in range(20) for reader in (first, second, third)]
    for number, answer in enumerate(answers):
        at = number // 3 * 1000
        assert answer.wait() == pack.content[at : at + 70_000]
    assert (Path(source.cache_dir) / shared.SOCKET).stat().st_mode & 0o77 == 0


def test_an_error_comes_to_the_guest_as_to_the_writer(readers, pack, source):
    writer, guest = readers(), readers()
    spoilt = bytearray(open_store(source.url).get(layout.pack_key(pack.id)))
    spoilt[100] ^= 1
    open_store(source.url).put(layout.pack_key(pack.id), spoilt)
    for pack_id, kind in ((pack.id, DamagedError), ("f" * 64, NotFoundError)):
        ours, theirs = (submit(reader, pack_id, 0, 10).wait() for reader in (writer, guest))
        assert type(ours) is type(theirs) is kind
        assert str(theirs) == str(ours)
        assert theirs.hint == ours.hint != ""


def test_an_unreachable_store_is_told_to_the_guest(readers, pack):
    readers(UnreachableStore, deadline=0.5)
    answer = submit(readers(), pack.id, 0, 10).wait()
    assert isinstance(answer, DeadlineError)
    assert pack.id in str(answer)


@pytest.mark.parametrize("cls", sorted(ERRNO, key=lambda cls: cls.__name__))
def test_every_error_crosses_the_socket(cls):
    kind, data = shared.encode_error(cls("no\nroom", hint="make some"))
    answer = shared.decode_error(kind, data)
    assert (type(answer), str(answer), answer.hint) == (cls, "no room", "make some")
    assert type(shared.decode_error(*shared.encode_error(cls("x")))) is cls


def test_errors_of_another_version():
    """What is sent has one meaning for ever, and an earlier guest reads it as words."""
    assert shared.encode_error(FloeError("x")) == (2, b"x")
    assert shared.encode_error(NotFoundError("no", hint="push it")) == (4, b"no\npush it")
    assert shared.encode_error(SourceChangedError("x"))[0] == 23
    earlier, later = shared.decode_error(1, b"no\nroom"), shared.decode_error(255, b"new\nhint")
    assert (type(earlier), str(earlier), earlier.hint) == (UnavailableError, "no\nroom", "")
    assert (type(later), str(later), later.hint) == (UnavailableError, "new", "hint")


def test_when_the_writer_ends_a_guest_takes_over_and_no_read_is_lost(readers, pack):
    silent = []

    def silence(store):
        silent.append(SilentStore(store, matches="packs/"))
        return silent[-1]

    first, second, third = readers(silence), readers(), readers()
    waiting = [submit(reader, pack.id, n * 100_000, 90_000) for n in range(8) for reader in (second, third)]
    assert not any(answer.came for answer in waiting)
    first.close()
    for number, answer in enumerate(waiting):
        at = number // 2 * 100_000
        assert answer.wait() == pack.content[at : at + 90_000]
    for reader in (second, third):
        assert read(reader, pack.id, 0, MIB) == pack.content[:MIB]


def test_when_the_writer_is_killed_a_guest_takes_over(readers, pack, source):
    script = f"""
import sys, threading
from floe.fuse.portable.shared import SharedReader, Source
reader = SharedReader({source!r})
print("ready", flush=True)
threading.Event().wait()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        guest = readers()
        assert guest.counters() == {}
        assert read(guest, pack.id, 0, MIB) == pack.content[:MIB]
        process.send_signal(signal.SIGSTOP)  # it takes requests, and does not answer
        waiting = submit(guest, pack.id, 2 * MIB, MIB)
        os.kill(process.pid, signal.SIGKILL)
    assert waiting.wait() == pack.content[2 * MIB : 3 * MIB]
    wait_until(lambda: guest.counters()["kept_held_bytes"])  # written behind the reader


def test_another_store_is_refused(readers, tmp_path):
    readers()
    with pytest.raises(UnavailableError, match="another store") as error:
        readers(url=f"file://{tmp_path}/other")
    assert "--cache-dir" in error.value.hint


def test_a_cache_that_something_else_writes_is_busy(readers, source, monkeypatch):
    monkeypatch.setattr(shared, "_JOIN", 0.2)
    writer = CacheWriter(NodeCache(Path(source.cache_dir)))
    try:
        with pytest.raises(BusyError, match="another process"):
            readers()
    finally:
        writer.close()
    readers()
