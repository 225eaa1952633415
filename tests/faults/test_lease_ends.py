"""Leases and jobs that end while their owner still uploads: it was stopped, or the index was away. Others take over, and all ends well."""

import contextlib
import itertools
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from support import images, pushing, redis_server, seaweed
from support.floe_node import Node, wait_until
from support.redis_server import RedisServer
from support.s3gate import S3Gate
from support.stores import StoreWrapper
from test_seeding import NAME, FakeNode, an_image, look

from floe.indexer import held as held_module
from floe.indexer import worker as worker_module
from floe.indexer.held import Held
from floe.seeding.seeder import ALL, FAILED, SEEDED, SeedConfig, Seeder
from floe.store.catalog import Catalog
from floe.store.errors import UnavailableError
from floe.store.index import open_index
from floe.store.index.jobs import DONE, UNCHANGED, Job
from floe.store.index.redis import leases
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.leases import RedisLease
from floe.store.index.redis.queue import LEASE_SECONDS, RedisQueue
from floe.store.objects.memory import MemoryStore
from floe.upkeep.fsck import Checker

LEASE = 0.5


class Stalling(StoreWrapper):
    """The first write below `prefix` waits until `go_on`."""

    def __init__(self, inner, prefix):
        super().__init__(inner)
        self._prefix = prefix
        self.reached, self.go_on = threading.Event(), threading.Event()

    def _wait(self, key):
        if key.startswith(self._prefix) and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(120)

    def put(self, key, data):
        self._wait(key)
        self.inner.put(key, data)

    def put_file(self, key, path, progress=None):
        self._wait(key)
        self.inner.put_file(key, path, progress)

    def put_if(self, key, data, version):
        self._wait(key)
        return self.inner.put_if(key, data, version)


class Cut(RedisQueue):
    """A queue whose servers do not answer while it is `away`; it counts how often they were asked then."""

    away, asked = False, 0

    def _call(self, work):
        if self.away:
            self.asked += 1
            raise UnavailableError("the index is away")
        return super()._call(work)


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def opened(store):
    """Opens (catalog, queue) of one who looks at the store through `view`."""
    url = redis_server.standalone().url()
    with contextlib.ExitStack() as stack:

        def make(view=store, lease=LEASE, url=url):
            catalog = Catalog(view, open_index(None))
            stack.callback(catalog.close)
            queue = Cut(RedisAddress.parse(url), catalog.ensure_store().uuid, lease=lease)
            stack.callback(queue.close)
            return catalog, queue

        yield make


def check(store, built):
    """All that is named is there and whole, the image once; nobody waits for anything."""
    catalog = Catalog(store, open_index(None))
    assert [record.manifest_digest for record in catalog.images()] == [built.manifest_digest]
    checked = Checker(catalog, deep=True).run()
    assert checked.faults == []
    assert (checked.layers, checked.images) == (len(set(built.diff_ids)), 1)
    assert [info.key for info in store.list("gc")] == []


# What a put is of: content, a tree, what names a layer, and the last of all
WHERE = ("packs/", "trees/", "refs/layers/", "refs/images/")


@pytest.mark.parametrize("where", WHERE)
def test_a_node_that_stood_still_and_the_one_that_took_over_both_end_well(store, opened, tmp_path, where):
    built = an_image(tmp_path)
    node = FakeNode()
    node.add(built)
    view = Stalling(store, where)
    slow, other = (Seeder(*opened(one), node, SeedConfig(ALL, tmp_path)) for one in (view, store))
    found = {}
    thread = threading.Thread(target=lambda: found.update(look(slow)))
    thread.start()
    try:
        assert view.reached.wait(60)
        slow.queue.away = True  # a process that stands still says nothing
        wait_until(lambda: look(other) == {SEEDED: [NAME]})
    finally:
        slow.queue.away = False
        view.go_on.set()
        thread.join()
    assert found in ({SEEDED: [NAME]}, {FAILED: [NAME]})
    check(store, built)
    assert look(other) == {}
    look(slow)
    check(store, built)


@pytest.fixture
def pushed(registry, tmp_path):
    built = images.build_oci(tmp_path / "oci", [images.files({"a": os.urandom(9000)}), images.files({"b": b"b"})])
    return built, pushing.push(built, registry.host, f"app{os.urandom(4).hex()}:1")


@pytest.mark.parametrize("where", WHERE)
def test_an_indexer_that_stood_still_and_the_one_that_took_over_count_one_job(
    store, opened, registry, pushed, tmp_path, where
):
    built, name = pushed
    view = Stalling(store, where)
    slow, other = (pushing.worker(*opened(one), tmp_path, registry_config=registry.config) for one in (view, store))
    slow._queue.put(Job(name))
    thread = threading.Thread(target=slow.run_one)
    thread.start()
    try:
        assert view.reached.wait(60)
        slow._queue.away = True
        wait_until(other.run_one)
        assert sum(other._queue.status().counts.values()) == 1
    finally:
        slow._queue.away = False
        view.go_on.set()
        thread.join()
    check(store, built)
    status = other._queue.status()
    assert status.counts in ({DONE: 1}, {UNCHANGED: 1})
    assert (status.waiting, status.working, status.retrying, status.failed) == (0, 0, 0, 0)


def test_while_the_index_is_away_a_job_is_done_and_counted_when_it_is_back(store, opened, registry, pushed, tmp_path):
    """For longer than the job and its lease last. What the servers had they have again."""
    built, name = pushed
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    try:
        view = Stalling(store, "trees/")
        catalog, queue = opened(view, url=server.url())
        indexer = pushing.worker(catalog, queue, tmp_path, registry_config=registry.config)
        queue.put(Job(name))
        thread = threading.Thread(target=_without_errors(indexer.run_one))
        thread.start()
        try:
            assert view.reached.wait(60)
            server.stop()
            time.sleep(2 * LEASE)  # for the servers' clock
            server.start()
        finally:
            view.go_on.set()
            thread.join()
        wait_until(lambda: _nothing_left(indexer, queue))
        check(store, built)
        counts = queue.status().counts
        assert counts.get(DONE, 0) + counts.get(UNCHANGED, 0) == 1
    finally:
        server.stop()


def _without_errors(call):
    def run():
        with contextlib.suppress(UnavailableError):
            call()

    return run


def _nothing_left(indexer, queue):
    try:
        indexer.run_one()
        status = queue.status()
    except UnavailableError:
        return False
    return (status.waiting, status.working, status.retrying) == (0, 0, 0)


# Renewals


def test_a_lease_is_kept_by_who_is_answered_once_while_it_lasts(opened):
    """Six attempts fail: as many as are made in a whole lease while all is well."""
    _, queue = opened(lease=3.0)
    failures = []

    def call(work):
        if threading.current_thread() is not threading.main_thread() and len(failures) < 6:
            failures.append(time.monotonic())
            raise UnavailableError("the index is away")
        return queue._call(work)

    lease = RedisLease.take(call, ["kept"], 3.0)
    taken = lease._until
    wait_until(lambda: lease._until > taken or lease.lost)
    assert len(failures) == 6
    assert not lease.lost
    lease.release()


# Seconds until an attempt fails: some end just after the index is back, and some begin just before that.
SILENT = [number / 4 for number in range(int(LEASE_SECONDS) + 1)]


class Clock:
    """Time that passes as it is waited for, in place of an Event and of the module `time`; `end` ends who waits."""

    def __init__(self, end):
        self.now, self._end = 0.0, end

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds
        return self.now >= self._end


class Away:
    """Servers that are away from just before `begin` for half of LEASE_SECONDS; who asks then, or within, waits `silent` s in vain."""

    def __init__(self, clock, begin, silent):
        self._clock, self._begin, self._silent = clock, begin - 0.001, silent
        self.answered = [0.0]

    def ask(self):
        if self._begin <= self._clock.now < self._begin + LEASE_SECONDS / 2:
            self._clock.now += self._silent
            raise UnavailableError("the index is away")
        self.answered.append(self._clock.now)
        return 1

    def longest(self):
        return max(after - before for before, after in itertools.pairwise(self.answered))


def test_an_index_that_is_away_for_half_a_minute_takes_no_lease(monkeypatch):
    """At the worst moment: just before a renewal. An attempt that gets no answer takes seconds itself."""
    for silent in SILENT:
        clock = Clock(300)
        away = Away(clock, LEASE_SECONDS / leases._RENEWALS, silent)
        monkeypatch.setattr(leases, "time", clock)
        lease = RedisLease(lambda _, away=away: away.ask(), ["kept"], LEASE_SECONDS)
        lease._until, lease._ended = LEASE_SECONDS, clock
        lease._renew()
        assert not lease.lost, silent
        assert away.longest() < LEASE_SECONDS


def test_an_index_that_is_away_for_half_a_minute_takes_no_job():
    for silent in SILENT:
        clock = Clock(300)
        every = LEASE_SECONDS / worker_module._RENEWALS
        away = Away(clock, every, silent)
        held = Held(SimpleNamespace(renew=lambda *_, away=away: away.ask()), "a", None, every)
        held._ended = clock
        held._run()
        assert not held.lost
        assert away.longest() < LEASE_SECONDS, silent


def test_a_lease_once_lost_stays_lost(opened):
    _, queue = opened()
    lease = queue.try_lease(["gone"], 0.2)
    queue.away = True
    wait_until(lambda: lease.lost)
    queue.away = False
    lease._until = time.monotonic() + 60  # as if an answer had come late
    assert lease.lost
    wait_until(lambda: not lease._thread.is_alive())
    lease.release()


def test_a_lease_whose_answer_was_lost_is_given_back(opened):
    _, queue = opened(lease=600.0)

    def call(work):
        result = queue._call(work)
        if not answered:
            answered.append(True)
            raise UnavailableError("the answer was lost")
        return result

    answered = []
    with pytest.raises(UnavailableError):
        RedisLease.take(call, ["floe:x", "floe:y"], 600.0)
    again = RedisLease.take(queue._call, ["floe:x", "floe:y"], 600.0)
    assert again is not None
    again.release()


def test_a_job_is_said_to_be_worked_on_as_soon_as_the_index_is_back(opened, monkeypatch):
    monkeypatch.setattr(held_module, "_SOONER", 1000)
    _, queue = opened(lease=600.0)
    queue.put(Job("registry.example/app:1"))
    task = queue.take("a")
    renewed = threading.Event()
    real = queue.renew

    def renew(worker, task):
        kept = real(worker, task)
        renewed.set()
        return kept

    monkeypatch.setattr(queue, "renew", renew)
    queue.away = True
    with Held(queue, "a", task, 1.0) as held:
        wait_until(lambda: queue.asked > 100)
        queue.away = False
        assert renewed.wait(60)
        assert not held.lost


# Waiting for others


def test_who_waits_for_layers_of_others_does_something_else_after_a_while(
    store, opened, registry, pushed, tmp_path, monkeypatch
):
    """Whoever has them may be slow, or stand still with a thread that still renews."""
    monkeypatch.setattr(worker_module, "_IDLE", 0.01)
    built, name = pushed
    second = images.build_oci(tmp_path / "second", [images.files({"c": b"c"})])
    other = pushing.push(second, registry.host, "other:1")
    catalog, queue = opened()
    lease = queue.try_lease([built.diff_ids[1]], 600.0)
    queue.put(Job(name))
    queue.put(Job(other))
    indexer = pushing.worker(catalog, queue, tmp_path, registry_config=registry.config)
    assert indexer.run_one()
    (failure,) = queue.status().failures
    assert (failure.job.tries, failure.due is None) == (0, False)
    assert "storing layers" in failure.job.error
    wait_until(lambda: catalog_has(catalog, second) or not indexer.run_one())
    assert not catalog_has(catalog, built)
    lease.release()
    wait_until(lambda: (indexer.run_one(), catalog_has(catalog, built))[1])
    assert queue.status().counts[DONE] == 2
    check_both = Checker(catalog, deep=True).run()
    assert check_both.faults == []


def catalog_has(catalog, built):
    return built.manifest_digest in {record.manifest_digest for record in catalog.images()}


# A process that is stopped for real


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_indexer_stopped_in_the_middle_of_an_upload_and_continued(registry, tmp_path, monkeypatch):
    weed = seaweed.running()
    for key, value in weed.environment().items():
        monkeypatch.setenv(key, value)
    built = images.build_oci(tmp_path / "oci", [images.files({"a": os.urandom(200_000)}), images.files({"b": b"b"})])
    name = pushing.push(built, registry.host, "stopped:1")
    node = Node(tmp_path)
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(S3Gate(weed, {seaweed.ACCESS_KEY: None}))
        reached, go_on = threading.Event(), threading.Event()
        stack.callback(go_on.set)
        node.environ |= weed.environment() | {
            "FLOE_STORE": gate.address(weed.bucket(), "stopped", path_style="true"),
            "FLOE_INDEX": redis_server.standalone().url(),
            "FLOE_REGISTRY_CONFIG": str(*registry.config),
            "FLOE_STORE_TIMEOUT": "60",
        }
        node.floe("store", "init")
        node.floe("image", "index", "--queue", name)

        def stall(action, key):
            if action == "s3:PutObject" and "/packs/" in key and not reached.is_set():
                reached.set()
                go_on.wait(120)

        gate.before = stall
        log = tmp_path / "slow.log"
        slow = pushing.start_indexer({**node.environ, "FLOE_SPOOL_DIR": str(tmp_path / "a")}, log, lease=1.0)
        stack.callback(lambda: (slow.kill(), slow.wait()))
        assert reached.wait(120)
        slow.send_signal(signal.SIGSTOP)
        other = pushing.start_indexer(
            {**node.environ, "FLOE_SPOOL_DIR": str(tmp_path / "b")}, tmp_path / "b.log", lease=1.0
        )
        stack.callback(lambda: (other.kill(), other.wait()))
        wait_until(lambda: node.json("indexer", "status")["counts"] == {DONE: 1})
        go_on.set()
        slow.send_signal(signal.SIGCONT)
        wait_until(lambda: "by now" in log.read_text() or "taken the job over" in log.read_text())
        slow.terminate()
        assert slow.wait(60) == 0
        status = node.json("indexer", "status")
        assert status["counts"] == {DONE: 1}
        assert (status["waiting"], status["working"], status["retrying"], status["failed"]) == (0, 0, 0, 0)
        assert node.json("fsck", "--deep")["faults"] == []
