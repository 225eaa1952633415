"""Redis stopped, restarted empty, failing over, read-only, slow, silent, full and evicting: what goes on without it.

Each time: refs that are known resolve, a push completes with nothing stored twice, and the state has its name.
"""

import contextlib
import logging
import time

import pytest
from support import redis_server
from support.fake_redis import FakeRedis
from support.slow_proxy import SlowProxy

from floe.ingest.model import push_model
from floe.store.catalog import Catalog
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.index.redis import index as index_module
from floe.store.index.status import index_status
from floe.store.objects.memory import MemoryStore
from floe.store.records import KIND_LAYER, ChainRecord, Manifest

LAYER = CHAIN = "sha256:" + "1" * 64  # of an image's lowest layer they are the same


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(index_module, "PUSH_SECONDS", 0.3)
    # A busy machine may take its time; the tests of slowness and of silence set these back.
    monkeypatch.setattr(index_module, "READ_SECONDS", 10.0)
    monkeypatch.setattr(index_module, "SLOW_SECONDS", 10.0)


class Fleet:
    """A store with a layer and a model, and an index at `url` that knows them; `catalog()` is a process of its own."""

    def __init__(self, tmp_path, url, stack):
        self.store, self.url, self._stack, self._tmp = MemoryStore(), url, stack, tmp_path
        self.model = tmp_path / "model"
        self.model.mkdir()
        for n in range(20):
            (self.model / f"file{n}").write_bytes(b"%d" % n * 5000)
        first = self.catalog()
        assert self.push(first, "model:1").new_packs == 1
        manifest = layer_of_the_model(first)
        first.set_layer(LAYER, first.put_manifest(manifest))
        first.set_chain(CHAIN, ChainRecord(LAYER))
        assert first.resolve_chain(CHAIN) is not None
        self.first = first

    def catalog(self, url=None):
        index = self._stack.enter_context(contextlib.closing(open_index(url or self.url)))
        return Catalog(self.store, index)

    def push(self, catalog, name):
        return push_model(catalog, self.model, ModelRef.parse(name), spool_dir=self._tmp / "spool")

    def goes_on(self, url=None):
        """For a process that knew the index well, and for one that has just started."""
        for n, catalog in enumerate((self.first, self.catalog(url))):
            for _ in range(3):
                assert catalog.resolve_chain(CHAIN)[0] == LAYER
                assert catalog.resolve_model(ModelRef.parse("model:1"))
            assert self.push(catalog, f"model:{n + 2}").new_packs == 0
            (self.model / "news").write_bytes(b"%f" % time.monotonic())
            assert self.push(catalog, f"model:{n + 2}").new_packs == 1

    def state(self, url=None):
        return index_status(url or self.url, self.first.check_store().uuid, 10)["state"]


def layer_of_the_model(catalog):
    """A layer of the same content as the model."""
    model = catalog.resolve_model(ModelRef.parse("model:1"))[1]
    return Manifest(KIND_LAYER, model.tree, model.packs, model.sizes, "test", model.created, {})


@pytest.fixture
def fleet(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda url: Fleet(tmp_path, url, stack)


@pytest.fixture
def server(tmp_path):
    made = redis_server.RedisServer(tmp_path / "server")
    yield made
    made.stop()


def test_stopped(fleet, server, caplog):
    made = fleet(server.url())
    assert made.state() == "ok"
    server.stop()
    made.goes_on()
    assert made.state() == "unreachable"
    assert "deduplicating with the store's chunk tables" in caplog.text
    server.start()
    fresh = made.catalog()
    assert made.push(fresh, "model:9").new_packs == 0
    assert made.state() == "ok"
    assert len(fresh.index.pack_ids()) == len(list(made.store.list("packs/")))


def test_restarted_empty(fleet, server, caplog):
    made = fleet(server.url())
    packs = made.first.index.pack_ids()
    server.restart_empty()
    assert made.state() == "empty"
    caplog.clear()
    node = made.catalog()
    for _ in range(3):
        assert node.resolve_chain(CHAIN)[0] == LAYER
    assert caplog.text.count("is empty or was replaced") == 1
    caplog.clear()
    made.goes_on()
    assert caplog.text.count("is filled from the bucket") == 1
    assert made.state() == "ok"
    fresh = made.catalog()
    fresh.check_store()
    assert fresh.index.pack_ids() >= packs
    assert fresh.index.get_ref("refs/layers/sha256/" + "1" * 64) is not None  # written back by who looked it up


def test_replaced_by_one_of_another_store(fleet, server, tmp_path):
    made = fleet(server.url())
    server.restart_empty()
    other = open_index(server.url())
    other.bind("another store")
    other.pack_ids()
    other.close()
    assert made.state() == "empty"
    made.goes_on()
    assert made.state() == "ok"


def test_failing_over(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PUSH_SECONDS", 20.0)
    guarded = redis_server.Guarded(tmp_path / "guarded")
    try:
        made = fleet(guarded.url())
        guarded.primary.ask("WAIT", 1, 5000)
        guarded.primary.stop()
        for _ in range(3):
            assert made.first.resolve_chain(CHAIN)[0] == LAYER
        assert made.push(made.catalog(), "model:2").new_packs == 0  # waits for the new primary
        guarded.wait_for_fail_over()
        made.goes_on()
        assert made.state() == "ok"
        fresh = made.catalog()
        fresh.check_store()
        assert fresh.index.pack_ids()
    finally:
        guarded.stop()


def test_read_only(fleet, server, tmp_path, caplog):
    replica = redis_server.RedisServer(tmp_path / "replica", "--replicaof", f"127.0.0.1 {server.port}")
    try:
        redis_server.wait_for(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up")
        made = fleet(server.url())
        server.ask("WAIT", 1, 5000)
        node = made.catalog(replica.url())
        for _ in range(3):
            assert node.resolve_chain(CHAIN)[0] == LAYER
        made.goes_on(replica.url())
        assert made.state(replica.url()) == "read-only"
        assert "read-only" in caplog.text
    finally:
        replica.stop()


def test_full(fleet, server, caplog):
    made = fleet(server.url())
    server.ask("CONFIG SET", "maxmemory", 1 << 20)
    made.goes_on()
    assert made.state() == "read-only"
    assert "is full" in caplog.text


def test_evicting(fleet, server, caplog):
    made = fleet(server.url())
    limit = server.ask("INFO", "memory")["used_memory"] + (1 << 20)
    server.ask("CONFIG SET", "maxmemory-policy", "allkeys-random", "maxmemory", limit)
    for n in range(64):
        server.ask("SET", f"filler {n}", "x" * (64 << 10))
    assert made.state() == "evicting"
    made.goes_on()
    assert "has dropped keys" in caplog.text
    assert made.state() == "evicting"


@pytest.fixture
def proxy(server):
    """Stands between the index and its server."""
    made = SlowProxy(("127.0.0.1", server.port))
    made.url = redis_server.address([int(made.address.rpartition(":")[2])])
    yield made
    made.go()
    made.close()


def test_slow(fleet, proxy, caplog, monkeypatch):
    """Answers that take long are borne three times in a row, then the bucket is asked instead."""
    made = fleet(proxy.url)
    proxy.latency = 0.15
    monkeypatch.setattr(index_module, "SLOW_SECONDS", 0.1)
    caplog.clear()
    for _ in range(6):
        assert made.first.resolve_chain(CHAIN)[0] == LAYER
    assert caplog.text.count("the bucket is asked instead") == 1
    passed = proxy.passed
    for _ in range(6):
        assert made.first.resolve_chain(CHAIN)[0] == LAYER
    assert proxy.passed == passed
    made.goes_on()
    assert made.state() == "ok"


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["reset", "cut"])
def test_breaking_off_all_the_time(fleet, proxy, caplog, share):
    """The command was carried out, and its answer does not come, or half of it."""
    made = fleet(proxy.url)
    proxy.breaks = share
    made.goes_on()
    assert made.state() == "unreachable"
    proxy.breaks = None
    assert made.push(made.catalog(), "model:9").new_packs == 0
    assert made.state() == "ok"


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["reset", "cut"])
def test_breaking_off_once_wherever_it_is(fleet, proxy, share):
    made = fleet(proxy.url)
    for number in range(12):
        fresh = made.catalog()
        (made.model / "news").write_bytes(b"%d" % number)
        proxy.breaks, proxy.breaks_times = share, 0
        for step in range(3):
            proxy.breaks_times = (number + step) % 3 == 0
            assert fresh.resolve_chain(CHAIN)[0] == LAYER
        proxy.breaks_times = 1 + number // 6
        assert made.push(fresh, f"model:{number + 2}").new_packs == 1
        proxy.breaks_times = 0
    assert made.push(made.catalog(), "model:99").new_packs == 0
    assert made.state() == "ok"


@pytest.mark.parametrize(
    "answer",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-MOVED 1234 127.0.0.1:PORT\r\n",
        b"-ASK 1234 127.0.0.1:PORT\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        pytest.param(b"$1000\r\nhalf of it", marks=pytest.mark.slow),
        pytest.param(b"*3\r\n:1\r\n", marks=pytest.mark.slow),
    ],
    ids=lambda answer: answer.split()[0].strip(b"-").decode(),
)
@pytest.mark.parametrize("info", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["", "also to INFO"])
def test_answering_nothing_but(fleet, server, monkeypatch, answer, info):
    """What a server says in rare moments, for good, and to itself where it sends clients elsewhere."""
    made = fleet(server.url())
    monkeypatch.setattr(index_module, "READ_SECONDS", 0.1)
    monkeypatch.setattr(index_module, "CONNECT_SECONDS", 0.5)
    fake = FakeRedis({})
    try:
        told = answer.replace(b"PORT", str(fake.server_address[1]).encode())
        fake.answers["*"] = told
        if not info:
            fake.answers["INFO"] = told
        strange = made.catalog(fake.url)
        for _ in range(3):
            assert strange.resolve_chain(CHAIN)[0] == LAYER
        assert made.push(strange, "model:2").new_packs == 0
        (made.model / "news").write_bytes(answer)
        assert made.push(strange, "model:3").new_packs == 1
        assert made.state(fake.url) != "ok" or info
    finally:
        fake.close()
    assert made.push(made.catalog(), "model:4").new_packs == 0


def test_silent(fleet, proxy, caplog, monkeypatch):
    """A server that accepts and never answers costs a look-up a quarter of a second, and the next ones nothing."""
    monkeypatch.setattr(index_module, "CONNECT_SECONDS", 1.0)
    made = fleet(proxy.url)
    monkeypatch.setattr(index_module, "READ_SECONDS", 0.25)
    proxy.hold()
    fresh = made.catalog()
    for catalog in (made.first, fresh):
        catalog.check_store()
        began = time.monotonic()
        for _ in range(20):
            assert catalog.resolve_chain(CHAIN)[0] == LAYER
        assert time.monotonic() - began < 5  # a timeout of the library alone would be that, for each look-up
    with caplog.at_level(logging.WARNING):
        assert made.push(fresh, "model:2").new_packs == 0
    assert "deduplicating with the store's chunk tables" in caplog.text
    assert index_status(proxy.url, "x", 0.5)["state"] == "unreachable"
    proxy.go()
    assert made.push(made.catalog(), "model:3").new_packs == 0
    assert made.state() == "ok"


def test_emptied_in_the_middle_of_a_push(fleet, server, caplog, monkeypatch):
    monkeypatch.setattr(index_module, "CHECK_SECONDS", 0.0)
    made = fleet(server.url())
    catalog = made.catalog()
    find = catalog.find_chunks

    def find_in_nothing(keys):
        server.empty()
        return find(keys)

    monkeypatch.setattr(catalog, "find_chunks", find_in_nothing)
    assert made.push(catalog, "model:2").new_packs == 0
    assert "emptied or replaced" in caplog.text
    monkeypatch.undo()
    made.goes_on()


def test_stopped_in_the_middle_of_a_push(fleet, server, caplog, monkeypatch):
    """The push completes and says which pack the index did not learn; the next push teaches it."""
    made = fleet(server.url())
    catalog = made.catalog()
    (made.model / "more").write_bytes(b"more" * 5000)
    add = catalog.add_pack

    def add_to_nothing(*args):
        server.stop()
        add(*args)

    monkeypatch.setattr(catalog, "add_pack", add_to_nothing)
    assert made.push(catalog, "model:2").new_packs == 1
    assert "will be learnt later" in caplog.text
    server.start()
    fresh = made.catalog()
    assert made.push(fresh, "model:3").new_packs == 0
    assert len(fresh.index.pack_ids()) == 2
