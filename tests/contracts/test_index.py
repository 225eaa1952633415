"""What every index promises, and what SQLite's does with a bad file, other stores and other processes.

Redis's own promises are in test_redis_index.py.
"""

import contextlib
import logging
import multiprocessing
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support import redis_server
from support.floe_node import wait_until

from floe.store.errors import BadInputError, UnavailableError
from floe.store.ids import digest, hexdigest
from floe.store.index import ChunkPlace, NullIndex, open_index
from floe.store.index.memory import MemoryIndex
from floe.store.index.redis import index as redis_index
from floe.store.packindex import ChunkEntry

ONE, TWO = "1" * 64, "2" * 64
REF = "refs/layers/sha256/" + "a" * 64


def chunk(number, block=None, length=4096):
    return ChunkEntry(digest(b"%d" % number), length, number if block is None else block)


def key(number, length=4096):
    return digest(b"%d" % number), length


SERVERS = {"redis": redis_server.standalone, "cluster": redis_server.cluster, "sentinel": redis_server.sentinel}
if shutil.which("valkey-server"):
    SERVERS["valkey"] = partial(redis_server.standalone, "valkey-server")


@pytest.fixture(params=["sqlite", "memory", *SERVERS])
def opening(request, tmp_path, monkeypatch):
    """Opens the index, each time anew; None for one that cannot be opened twice."""
    if request.param == "memory":
        return None
    if request.param == "sqlite":
        return lambda: open_index(f"sqlite:{tmp_path}/deep/index.db")
    monkeypatch.setattr(redis_index, "READ_SECONDS", 10.0)  # this machine may be busy
    monkeypatch.setattr(redis_index, "SLOW_SECONDS", 10.0)
    server = SERVERS[request.param]()
    server.empty()
    return lambda: open_index(server.url())


@pytest.fixture
def index(opening):
    opened = opening() if opening else MemoryIndex()
    opened.bind("store-a")
    yield opened
    opened.close()


@pytest.fixture
def other(opening):
    """The same index as another process has it."""
    if opening is None:
        pytest.skip("an index in memory is one process's own")
    opened = opening()
    opened.bind("store-a")
    yield opened
    opened.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index.db"


def test_chunks_are_found_where_their_pack_has_them(index):
    index.add_pack(ONE, [chunk(1, 7), chunk(2, 9, 100)])
    assert index.find_chunks([key(1), key(2, 100), key(2), key(3)]) == {
        key(1): ChunkPlace(ONE, 7),
        key(2, 100): ChunkPlace(ONE, 9),
    }
    assert index.find_chunks([]) == {}
    assert index.pack_ids() == {ONE}


def test_a_chunk_in_two_packs_survives_one_of_them(index):
    index.add_pack(ONE, [chunk(1, 1), chunk(2)])
    index.add_pack(TWO, [chunk(1, 2)])
    index.remove_packs([ONE, "3" * 64])
    assert index.find_chunks([key(1), key(2)]) == {key(1): ChunkPlace(TWO, 2)}
    assert index.pack_ids() == {TWO}
    index.remove_packs([])
    index.remove_packs({TWO})
    assert index.find_chunks([key(1)]) == {}


def test_a_pack_may_be_added_again(index):
    for _ in range(2):
        index.add_pack(ONE, iter([chunk(1, 1)]))
    assert index.pack_ids() == {ONE}
    assert index.find_chunks([key(1)]) == {key(1): ChunkPlace(ONE, 1)}


def test_a_pack_without_chunks_is_known(index):
    index.add_pack(ONE, [])
    assert index.pack_ids() == {ONE}


def test_notes_are_listed_by_topic_replaced_and_taken_away(index):
    assert index.notes("nodes") == {}
    index.put_note("nodes", "a.example", b"1", 60)
    index.put_note("nodes", "b", bytes(range(256)), 60)
    index.put_note("orders", "a.example", b"", 60)
    index.put_note("nodes", "a.example", b"2", 60)
    assert {name: note.data for name, note in index.notes("nodes").items()} == {
        "a.example": b"2",
        "b": bytes(range(256)),
    }
    assert [note.data for note in index.notes("orders").values()] == [b""]
    index.delete_note("nodes", "b")
    index.delete_note("nodes", "b")
    assert list(index.notes("nodes")) == ["a.example"]


def test_a_note_is_gone_when_its_time_is_over_and_can_come_again(index):
    index.put_note("nodes", "short", b"1", 0.05)
    index.put_note("nodes", "long", b"2", 60)
    wait_until(lambda: list(index.notes("nodes")) == ["long"])
    index.put_note("nodes", "short", b"3", 60)
    assert {name: note.data for name, note in index.notes("nodes").items()} == {"short": b"3", "long": b"2"}


def test_notes_tell_how_old_they_are(index):
    index.put_note("nodes", "first", b"", 60)
    wait_until(lambda: index.notes("nodes")["first"].age > 0.2)
    index.put_note("nodes", "second", b"", 600)
    ages = {name: note.age for name, note in index.notes("nodes").items()}
    assert 0 <= ages["second"] < ages["first"] < 60
    index.put_note("nodes", "first", b"", 60)
    assert index.notes("nodes")["first"].age < ages["first"]


def test_another_process_reads_the_notes(index, other):
    index.put_note("nodes", "a", b"1", 60)
    assert other.notes("nodes")["a"].data == b"1"
    other.delete_note("nodes", "a")
    assert index.notes("nodes") == {}


def test_stores_have_notes_of_their_own(index, opening):
    if opening is None:
        pytest.skip("an index in memory is one process's own")
    index.put_note("nodes", "a", b"1", 60)
    with contextlib.closing(opening()) as another:
        another.bind("store-b")
        assert another.notes("nodes") == {}
        another.put_note("nodes", "b", b"2", 60)
        assert list(another.notes("nodes")) == ["b"]


def test_refs_are_kept_replaced_and_forgotten(index):
    assert index.get_ref(REF) is None
    index.put_ref(REF, b"one")
    index.put_ref(REF, b"two")
    assert index.get_ref(REF) == b"two"
    index.delete_ref(REF)
    index.delete_ref(REF)
    assert index.get_ref(REF) is None


def test_another_store_empties_it(index):
    index.add_pack(ONE, [chunk(1)])
    index.put_ref(REF, b"one")
    index.bind("store-a")
    assert index.pack_ids() == {ONE}
    index.bind("store-b")
    assert index.pack_ids() == set()
    assert index.find_chunks([key(1)]) == {}
    assert index.get_ref(REF) is None


def test_many_chunks_at_once(index):
    entries = [chunk(n) for n in range(5000)]
    index.add_pack(ONE, entries)
    keys = [(e.digest, e.length) for e in entries]
    assert index.find_chunks([*keys, key(5000)]) == {k: ChunkPlace(ONE, n) for n, k in enumerate(keys)}
    index.remove_packs([ONE])
    assert index.find_chunks(keys) == {}


def test_the_ends_of_what_is_stored(index):
    last = (1 << 20) - 1  # the last block of a pack of 4 GiB
    index.add_pack(ONE, [chunk(1, 0, 1), chunk(2, last, 4 << 20)])
    assert index.find_chunks([key(1, 1), key(2, 4 << 20)]) == {
        key(1, 1): ChunkPlace(ONE, 0),
        key(2, 4 << 20): ChunkPlace(ONE, last),
    }
    index.put_ref(REF, b"")
    assert index.get_ref(REF) == b""
    index.put_ref(REF, bytes(range(256)) * 4096)
    assert index.get_ref(REF) == bytes(range(256)) * 4096


def test_another_process_sees_it_at_once(index, other):
    assert other.pack_ids() == set()
    index.add_pack(ONE, [chunk(1)])
    index.put_ref(REF, b"one")
    assert other.find_chunks([key(1)]) == {key(1): ChunkPlace(ONE, 1)}
    assert other.get_ref(REF) == b"one"
    other.remove_packs([ONE])
    assert other.pack_ids() == index.pack_ids() == set()
    assert index.find_chunks([key(1)]) == {}


def test_many_threads(index):
    def work(number):
        index.add_pack(hexdigest(b"pack %d" % number), [chunk(n) for n in range(number, number + 20)])
        index.put_ref(f"{REF}{number}", b"%d" % number)
        return index.find_chunks([key(number)])[key(number)].block

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(40))) == list(range(40))
    assert len(index.pack_ids()) == 40


def test_valkey_is_among_them():
    if "valkey" not in SERVERS:
        pytest.skip("there is no valkey-server on this machine (Debian 12 has none): Valkey was not run")


def test_no_index_knows_nothing():
    index = open_index(None)
    assert isinstance(index, NullIndex)
    index.bind("store-a")
    index.add_pack(ONE, [chunk(1)])
    index.put_ref(REF, b"one")
    index.remove_packs([ONE])
    index.delete_ref(REF)
    assert (index.find_chunks([key(1)]), index.pack_ids(), index.get_ref(REF)) == ({}, set(), None)
    index.close()
    assert isinstance(open_index("none"), NullIndex)


@pytest.mark.parametrize(
    "url", ["sqlite:", "sqlite:relative.db", "sqlite:/dir/", "mysql://x", "/var/lib/index.db", "redis:x"]
)
def test_addresses_that_are_refused(url):
    with pytest.raises(BadInputError, match="index address"):
        open_index(url)


def test_addresses_that_mean_the_same():
    assert open_index("sqlite:///a/b.db").url == open_index("sqlite:/a/b.db").url == "sqlite:/a/b.db"


def test_sqlite_remembers(path):
    first = open_index(f"sqlite:{path}")
    first.bind("store-a")
    first.add_pack(ONE, [chunk(1)])
    first.close()
    second = open_index(f"sqlite:{path}")
    second.bind("store-a")
    assert second.find_chunks([key(1)]) == {key(1): ChunkPlace(ONE, 1)}
    assert path.stat().st_mode & 0o077 == 0
    second.close()


def _foreign(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.execute("INSERT INTO theirs VALUES (42)")
    db.close()


def _of_another_version(path):
    open_index(f"sqlite:{path}").bind("store-a")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no database at all, not even close" * 300),
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(5000)),
        _foreign,
        _of_another_version,
    ],
    ids=["text", "header-only", "foreign", "version"],
)
def test_a_bad_file_is_set_aside_and_begun_anew(path, spoil, caplog):
    spoil(path)
    before = path.read_bytes()
    index = open_index(f"sqlite:{path}")
    with caplog.at_level(logging.WARNING):
        index.bind("store-a")
    assert "set aside" in caplog.text
    index.add_pack(ONE, [chunk(1)])
    assert index.pack_ids() == {ONE}
    (aside,) = [p for p in path.parent.iterdir() if ".damaged-" in p.name and not p.name.endswith(("-wal", "-shm"))]
    assert aside.read_bytes() == before
    index.close()


def test_damage_while_in_use_is_set_aside(path, caplog):
    index = open_index(f"sqlite:{path}")
    index.bind("store-a")
    index.add_pack(ONE, [chunk(n) for n in range(5000)])
    index.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    index = open_index(f"sqlite:{path}")
    index.bind("store-a")
    assert index.pack_ids() == set()
    assert "set aside" in caplog.text
    index.put_ref(REF, b"1")
    assert index.get_ref(REF) == b"1"
    index.close()


def test_a_deleted_file_is_begun_anew_under_a_running_process(path):
    index = open_index(f"sqlite:{path}")
    index.bind("store-a")
    index.add_pack(ONE, [chunk(1)])
    for name in path.parent.glob("index.db*"):
        name.unlink()
    assert index.pack_ids() == set()
    index.add_pack(TWO, [chunk(2)])
    other = open_index(f"sqlite:{path}")
    other.bind("store-a")
    assert other.pack_ids() == {TWO}
    index.close()
    other.close()


def test_a_store_that_lost_its_index_to_another_gets_an_error_not_wrong_chunks(path):
    mine, theirs = open_index(f"sqlite:{path}"), open_index(f"sqlite:{path}")
    mine.bind("store-a")
    mine.add_pack(ONE, [chunk(1)])
    theirs.bind("store-b")
    for use in (
        lambda: mine.add_pack(ONE, [chunk(1)]),
        lambda: mine.find_chunks([key(1)]),
        mine.pack_ids,
        lambda: mine.get_ref(REF),
        lambda: mine.put_ref(REF, b"x"),
    ):
        with pytest.raises(UnavailableError, match="another store") as caught:
            use()
        assert caught.value.hint
    assert theirs.pack_ids() == set()
    mine.close()
    theirs.close()


def test_a_place_that_cannot_hold_a_file_is_unavailable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    index = open_index(f"sqlite:{tmp_path}/file/index.db")
    with pytest.raises(UnavailableError, match=r"index\.db"):
        index.bind("store-a")
    (tmp_path / "folder.db").mkdir()
    index = open_index(f"sqlite:{tmp_path}/folder.db")
    with pytest.raises(UnavailableError, match=r"folder\.db"):
        index.bind("store-a")
    index.close()


def test_a_locked_file_is_unavailable_and_not_set_aside(path, monkeypatch):
    monkeypatch.setattr("floe.store.index.sqlite._BUSY_TIMEOUT", 0.05)
    index = open_index(f"sqlite:{path}")
    index.bind("store-a")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UnavailableError, match="locked"):
        index.add_pack(ONE, [chunk(1)])
    holder.execute("ROLLBACK")
    holder.close()
    index.add_pack(ONE, [chunk(1)])
    assert [p.name for p in Path(path.parent).iterdir() if "damaged" in p.name] == []
    index.close()


def _add_packs(url, number):
    index = open_index(url)
    index.bind("store-a")
    for n in range(20):
        index.add_pack(f"{number * 1000 + n:064x}", [chunk(number * 1000 + n)])
    index.close()


def test_many_processes(path):
    url = f"sqlite:{path}"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_packs, args=(url, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
        worker.close()
    index = open_index(url)
    index.bind("store-a")
    assert len(index.pack_ids()) == 60
    assert len(index.find_chunks([key(n * 1000 + 7) for n in range(3)])) == 3
    index.close()


def test_reading_goes_on_while_another_writes(path):
    index = open_index(f"sqlite:{path}")
    index.bind("store-a")
    index.put_ref(REF, b"1")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    found = []
    reader = threading.Thread(target=lambda: found.append(index.get_ref(REF)))
    reader.start()
    reader.join(4)
    assert found == [b"1"]
    writer.execute("ROLLBACK")
    writer.close()
    index.close()
