"""Indexers: what becomes of a job, whatever the image, the registry or the worker does."""

import contextlib
import http.client
import json
import os
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import images, pushing
from support.floe_node import wait_until
from support.notifying import SECRET, event, post, webhook
from support.pushing import push
from support.registry import Front, Registry
from support.stores import StoreWrapper

from floe.indexer import metrics
from floe.indexer import worker as worker_module
from floe.indexer.held import Held, Watch
from floe.indexer.retention import Retention
from floe.ingest.oci.image import index_image
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_target
from floe.ingest.oci.references import parse_registry_ref
from floe.ingest.oci.registry import Registry as RegistryImage
from floe.ingest.oci.taken import TAKEN
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, BadInputError, CancelledError, NotFoundError, UnavailableError
from floe.store.exposition import read_metrics
from floe.store.hotlayout import HotLayouts
from floe.store.imagepolicy import ImageRule
from floe.store.index import open_index
from floe.store.index.jobs import CHECK, DONE, REFUSED, UNCHANGED, Job
from floe.store.objects.memory import MemoryStore
from floe.store.profile import Profile, Touch
from floe.store.profiles import ProfileStore, layer_source


@pytest.fixture
def make(catalog, queue, registry, tmp_path):
    """Makes an indexer; what stops it is its `_stop`."""

    def indexer(catalog=catalog, registry_config=registry.config, **options):
        return pushing.worker(catalog, queue, tmp_path, registry_config=registry_config, **options)

    return indexer


@pytest.fixture
def indexer(make):
    return make()


def built(folder, *contents, **options):
    return images.build_oci(folder, [images.files(content) for content in contents], **options)


def a_push(tmp_path, registry, name, *contents):
    contents = contents or ({"etc/a": name.encode()}, {"b": os.urandom(5000)})
    image = built(tmp_path / f"image-{name.replace(':', '-').replace('/', '-')}", *contents)
    return image, push(image, registry.host, name)


def test_an_image_is_indexed_and_a_second_time_nothing_changes(indexer, catalog, queue, registry, tmp_path):
    image, name = a_push(tmp_path, registry, "twice:1")
    queue.put(Job(name))
    assert indexer.run_one()
    record = catalog.image(image.manifest_digest)
    assert record.names == (name,)
    assert all(catalog.resolve_chain(chain) for chain in record.chain_ids)
    before = [info.key for info in catalog.store.list("")]
    queue.put(Job(name))
    assert indexer.run_one()
    assert not indexer.run_one()
    assert queue.status().counts == {DONE: 1, UNCHANGED: 1}
    assert catalog.image(image.manifest_digest) == record
    assert [info.key for info in catalog.store.list("")] == before


def scraped(address):
    """Samples by name and labels' values."""
    families = text_string_to_metric_families(read_metrics(address))
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_its_metrics_say_what_it_took_of_the_registry_as_the_registrys_own_log_does(indexer, queue, registry, tmp_path):
    _, name = a_push(tmp_path, registry, "counted:1")
    queue.put(Job(name))
    queue.put(Job("not an image"))
    with metrics.serving("127.0.0.1:0", indexer, queue) as address:
        wait_until(lambda: ("floe_indexer_queue_lag_seconds",) in scraped(address))
        before, log = scraped(address), registry.downloads()
        assert before["floe_indexer_queue_jobs", "waiting"] == 2
        assert indexer.run_one()
        assert indexer.run_one()
        after = scraped(address)
        for what, contents in registry.downloads().items():
            for content, count in contents.items():
                key = (f"floe_registry_{what}_total", content)
                assert after[key] - before[key] == count - log[what][content] > 0
        became = {key[1]: value for key, value in after.items() if key[0] == "floe_indexer_jobs_total" and value}
        assert became == {"done": 1, "failed": 1}


def test_a_download_that_breaks_off_is_counted_as_far_as_it_came(registry, tmp_path):
    image, name = a_push(tmp_path, registry, "broken-off:1", {"big": os.urandom(200_000)})
    with Front(registry, breaks=1, cut=100_000) as front:
        found = parse_registry_ref(name.replace(registry.host, front.host))
        before = TAKEN.counted()
        with contextlib.closing(RegistryImage(found, plain_http=True)) as source:
            layer = image.layers[0]
            descriptor = Descriptor(layer["mediaType"], layer["digest"], layer["size"])
            assert sum(map(len, source.open_blob(descriptor))) == descriptor.size
        after = TAKEN.counted()
        assert after["requests"]["blob"] - before["requests"]["blob"] == 2
        assert after["bytes"]["blob"] - before["bytes"]["blob"] == descriptor.size
        assert (206, "GET") in zip(front.answered, (method for method, _, _ in front.seen), strict=True)


def test_a_registry_that_is_away_is_asked_again_and_an_image_that_is_none_is_given_up(
    indexer, queue, registry, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker_module, "TRIES", 2)
    monkeypatch.setattr(worker_module, "_DELAY", 0.0)
    queue.put(Job(f"{registry.host}/nowhere:1"))
    assert indexer.run_one()
    assert queue.status().retrying == 1
    assert indexer.run_one()
    (failure,) = queue.status().failures
    assert (failure.due, failure.job.tries) == (None, 2)
    assert "nowhere" in failure.job.error
    queue.put(Job("not an image"))
    assert indexer.run_one()
    assert queue.status().failures[0].job.tries == 1  # nothing will mend it
    assert queue.status().counts == {"retried": 1, "failed": 2}


@pytest.mark.parametrize("shortest", [True, False])
def test_a_registry_may_be_away_for_a_quarter_of_an_hour_before_its_jobs_are_given_up(
    indexer, queue, registry, monkeypatch, shortest
):
    """From 5 s on to 10 minutes, as docs/OPERATIONS.md says."""
    monkeypatch.setattr(worker_module.random, "uniform", lambda low, high: low if shortest else high)
    pauses, retry = [], queue.retry

    def at_once(worker, task, job, delay):
        pauses.append(delay)
        return retry(worker, task, job, 0.0)

    monkeypatch.setattr(queue, "retry", at_once)
    queue.put(Job(f"{registry.host}/nowhere:1"))
    wait_until(lambda: (indexer.run_one(), queue.status().failed)[1])
    (failure,) = queue.status().failures
    assert failure.job.tries == len(pauses) + 1 == 9
    assert sum(pauses) >= 15 * 60
    if not shortest:
        assert (pauses[0], pauses[-1]) == (5.0, 600.0)


def test_a_layer_that_is_damaged_is_given_up_at_once_and_publishes_nothing(indexer, catalog, queue, registry, tmp_path):
    image = built(tmp_path / "damaged", {"a": os.urandom(3000)})
    config = image.directory / "blobs/sha256" / image.config_digest.partition(":")[2]
    spoiled = json.loads(config.read_text())
    spoiled["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    image = images.build_oci(tmp_path / "spoiled", [images.files({"a": b"a"})], config=spoiled)
    queue.put(Job(push(image, registry.host, "damaged:1")))
    assert indexer.run_one()
    (failure,) = queue.status().failures
    assert "does not match its diff id" in failure.job.error
    assert [info.key for info in catalog.store.list("refs")] == []


def test_a_job_over_which_workers_die_is_given_up(make, catalog, queue, registry, tmp_path):
    _, name = a_push(tmp_path, registry, "deadly:1")
    queue.put(Job(name))
    queue.lease_seconds = 0.0
    for number in range(worker_module.DELIVERIES):
        assert queue.take(f"dead-{number}").deliveries == number + 1
    last = make()
    assert last.run_one()
    (failure,) = queue.status().failures
    assert f"{worker_module.DELIVERIES} indexers fell silent over it" in failure.job.error
    assert list(catalog.images()) == []


def test_a_job_in_hand_is_given_back_when_the_worker_stops(make, catalog, queue, registry, tmp_path):
    _, name = a_push(tmp_path, registry, "stopped:1")
    queue.put(Job(name))
    stopped = make()
    stopped._stop.set()
    assert stopped.run_one()
    assert list(catalog.images()) == []
    status = queue.status()
    assert (status.waiting, status.working, dict(status.counts)) == (1, 0, {})
    other = make()
    other.run(drain=True)
    assert [record.names for record in catalog.images()] == [(name,)]
    assert other.name not in {one.name for one in queue.status().workers}  # who ends is forgotten


def test_a_job_that_was_lost_is_not_counted_by_who_lost_it(make, catalog, queue, registry, tmp_path):
    """The worker was paused for longer than its lease; another one has done its job meanwhile."""
    _, name = a_push(tmp_path, registry, "lost:1")
    queue.put(Job(name))
    slow = make()
    work = slow._work

    def paused(job, watch):
        queue.lease_seconds = 0.0
        task = queue.take("other")
        assert queue.finish("other", task, DONE)
        return work(job, watch)

    slow._work = paused
    assert slow.run_one()
    assert queue.status().counts == {DONE: 1}


def test_layers_that_another_indexer_stores_are_waited_for(make, catalog, queue, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_IDLE", 0.01)
    image, name = a_push(tmp_path, registry, "shared:1")
    lease = queue.try_lease([image.diff_ids[0]], 600)
    queue.put(Job(name))
    one = make()
    waits = threading.Event()
    stop_wait = one._stop.wait

    def wait(seconds=None):
        waits.set()
        return stop_wait(seconds)

    one._stop.wait = wait
    thread = threading.Thread(target=one.run_one)
    thread.start()
    assert waits.wait(60)
    assert list(catalog.images()) == []
    lease.release()
    thread.join()
    assert [record.names for record in catalog.images()] == [(name,)]


def test_a_store_that_refuses_is_tried_again_later(make, queue, registry, tmp_path):
    class Refusing(StoreWrapper):
        def put(self, key, data):
            if key.startswith("manifests/"):
                raise AccessDeniedError("no permission to write")
            return super().put(key, data)

    refusing = Catalog(Refusing(MemoryStore()), open_index(None))
    _, name = a_push(tmp_path, registry, "refused:1")
    queue.put(Job(name))
    one = make(catalog=refusing)
    assert one.run_one()
    (failure,) = queue.status().failures
    assert failure.due is not None
    assert "no permission to write" in failure.job.error


def test_an_indexer_that_may_not_delete_records_goes_on(make, monkeypatch, caplog):
    one = make(grace=60.0)

    def refused(_retention, _is_over):
        one._stop.set()  # what comes after this turn is of no interest
        raise AccessDeniedError("no permission to delete")

    monkeypatch.setattr(Retention, "sweep", refused)
    one.run()
    assert "no permission to delete" in caplog.text


def test_no_job_waits_for_a_sweep(make, catalog, queue, registry, tmp_path, monkeypatch):
    """As where a registry is away, and each of its images costs the timeouts of several attempts."""
    sweeping, go_on = threading.Event(), threading.Event()

    def slow(_retention, is_over):
        sweeping.set()
        assert go_on.wait(60)
        ended.append(is_over())

    ended = []
    monkeypatch.setattr(Retention, "sweep", slow)
    one = make(grace=60.0)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        assert sweeping.wait(60)
        _, name = a_push(tmp_path, registry, "meanwhile:1")
        queue.put(Job(name))
        wait_until(lambda: [record.names for record in catalog.images()] == [(name,)])
        assert ended == []
    finally:
        one._stop.set()
        go_on.set()
        thread.join()
    assert ended == [True]  # it ends with the process


def test_two_sweeps_never_overlap_however_long_one_takes(make, queue, monkeypatch):
    monkeypatch.setattr(queue, "lease_seconds", 1.0)
    began, go_on, lost = threading.Semaphore(0), threading.Event(), []

    def slow(_retention, is_over):
        began.release()
        assert go_on.wait(60)
        lost.append(is_over())

    monkeypatch.setattr(Retention, "sweep", slow)
    one, other = (make(grace=60.0, sweep=0.01)._sweeps for _ in range(2))
    thread = threading.Thread(target=one.turn)
    thread.start()
    assert began.acquire(timeout=60)
    try:
        until = time.monotonic() + 2.0  # for the servers' clock: turns and an unrenewed lease would have ended
        while time.monotonic() < until:
            other.turn()
            time.sleep(0.02)
        assert not began.acquire(blocking=False)
    finally:
        go_on.set()
        thread.join()
    assert lost == [False]
    wait_until(lambda: (other.turn(), began.acquire(blocking=False))[1])


def test_a_sweep_whose_lease_was_lost_ends(make, queue, monkeypatch):
    lease = queue.try_lease(["sweep"], 60.0)
    monkeypatch.setattr(queue, "try_lease", lambda names, _: lease if names == ["sweep"] else None)
    found = []

    def losing(_retention, is_over):
        found.append(is_over())
        lease._lost = True
        found.append(is_over())

    monkeypatch.setattr(Retention, "sweep", losing)
    make(grace=60.0)._sweeps.turn()
    assert found == [False, True]


def test_who_ends_when_nothing_waits_sweeps_when_it_is_its_turn(make, monkeypatch):
    swept = []
    monkeypatch.setattr(Retention, "sweep", lambda _, is_over: swept.append(is_over()))
    make(grace=60.0).run(drain=True)
    make(grace=60.0).run(drain=True)
    make().run(drain=True)
    assert swept == [False]


@pytest.mark.parametrize("retryable", [True, False])
def test_who_ends_when_nothing_waits_ends_too_when_the_queue_cannot_be_asked(make, queue, monkeypatch, retryable):
    monkeypatch.setattr(worker_module, "_IDLE", 0.01)
    monkeypatch.setattr(worker_module, "_ENDURED", 0.2)
    error, asked = UnavailableError("the index is away"), []
    error.retryable = retryable

    def away(_worker):
        asked.append(time.monotonic())
        raise error

    monkeypatch.setattr(queue, "take", away)
    with pytest.raises(UnavailableError, match="the index is away"):
        make().run(drain=True)
    if retryable:
        assert len(asked) > 2
        assert asked[-1] - asked[0] > 0.2
    else:
        assert len(asked) == 1


def test_a_queue_that_is_back_within_a_minute_is_drained(make, catalog, queue, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "_IDLE", 0.01)
    _, name = a_push(tmp_path, registry, "back:1")
    queue.put(Job(name))
    take, failures = queue.take, [UnavailableError("the index is away")] * 2

    def back(worker):
        if failures:
            raise failures.pop()
        return take(worker)

    monkeypatch.setattr(queue, "take", back)
    make().run(drain=True)
    assert [record.names for record in catalog.images()] == [(name,)]


# Policies


def test_policies_say_what_is_indexed(make, catalog, queue, registry, tmp_path):
    _, small = a_push(tmp_path, registry, "team/small:1", {"a": b"a"})
    _, large = a_push(tmp_path, registry, "team/large:1", {"a": os.urandom(200_000)})
    _, never = a_push(tmp_path, registry, "team/never:1", {"a": b"c"})
    _, other = a_push(tmp_path, registry, "other:1", {"a": b"d"})
    rules = (
        ImageRule(f"{registry.host}/team/never", never=True),
        ImageRule(f"{registry.host}/team/*", max_size=100_000),
    )
    one = make(rules=rules)
    for name in (small, large, never, other):
        queue.put(Job(name))
    one.run(drain=True)
    assert [record.names for record in catalog.images()] == [(small,)]
    assert queue.status().counts == {DONE: 1, REFUSED: 3}


def test_all_platforms_of_a_policy_that_the_image_has_are_indexed(make, catalog, queue, registry, tmp_path):
    folder = tmp_path / "many"
    for architecture in ("amd64", "arm64", "s390x"):
        image = built(folder, {"a": architecture.encode()}, tag=architecture, architecture=architecture)
        push(image, registry.host, f"many:{architecture}")
    entries = json.loads((folder / "index.json").read_text())["manifests"]
    raw = json.dumps({"schemaVersion": 2, "mediaType": images.INDEX, "manifests": entries}).encode()
    with contextlib.closing(open_target(f"{registry.host}/many:1", plain_http=True)) as target:
        target.put_manifest(raw, images.INDEX)
    rules = (ImageRule("*", platforms=("linux/amd64", "linux/arm64", "linux/riscv64")),)
    one = make(rules=rules)
    queue.put(Job(f"{registry.host}/many:1"))
    one.run(drain=True)
    assert sorted(record.platform for record in catalog.images()) == ["linux/amd64", "linux/arm64"]
    queue.put(Job(f"{registry.host}/many:1", platform="linux/s390x"))
    one.run(drain=True)
    assert sorted(record.platform for record in catalog.images()) == ["linux/amd64", "linux/arm64", "linux/s390x"]


# Next version first


def test_a_new_tag_is_indexed_with_the_profile_of_the_version_before(catalog, queue, indexer, registry, tmp_path):
    """Its hot files lie together before anybody starts it, and its first start has its predecessor's profile."""
    hot = [f"d{n % 7}/f{n:03}" for n in range(0, 240, 20)]
    content = {f"d{n % 7}/f{n:03}": os.urandom(9000) for n in range(240)}
    first, name = a_push(tmp_path, registry, "versions:1", content)
    queue.put(Job(name))
    indexer.run(drain=True)
    tree = catalog.layer(first.diff_ids[0])[1].tree.digest
    profiles = ProfileStore(catalog)
    pieces = {(path.encode(), 0): Touch(number, 1) for number, path in enumerate(hot)}
    profiles.add(tree, Profile(starts=1, pieces=pieces))
    second, _ = a_push(tmp_path, registry, "versions:2", {path: data + b"2" for path, data in content.items()})
    with webhook(queue, tmp_path) as hook:
        assert post(hook, event(registry.host, "versions", "2")) == 202
    indexer.run(drain=True)
    record = catalog.image(second.manifest_digest)
    of_second = profiles.of_tree(catalog.layer(second.diff_ids[0])[1].tree.digest)
    assert of_second.source == layer_source(name, record.platform, 0)
    assert {path for path, _ in profiles.of_source(of_second.source).hot_pieces()} == {path.encode() for path in hot}
    assert _laid_out(catalog, of_second.source)


def _laid_out(catalog, source):
    return HotLayouts(catalog).places(source)


# What the registry no longer has


class Answers:
    """What registries say of images, by their names; True: it is gone."""

    def __init__(self):
        self.said = {}
        self.asked = []

    def __call__(self, ref, plain_http, registry_config):
        self.asked.append(str(ref))
        answer = self.said.get(ref.repository, False)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def clock(monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr("floe.indexer.retention.time.time", lambda: now[0])
    return now


@pytest.fixture
def known(indexer, catalog, queue, registry, tmp_path):
    """An image under two tags of one repository and a name in another."""
    image, name = a_push(tmp_path, registry, "kept/a:1")
    names = [name, push(image, registry.host, "kept/a:2"), push(image, registry.host, "kept/b:1")]
    for one in names:
        queue.put(Job(one))
    indexer.run(drain=True)
    assert catalog.image(image.manifest_digest).names == tuple(sorted(names))
    return image.manifest_digest


def test_a_record_goes_when_the_registry_says_twice_that_it_is_gone(known, catalog, queue, clock):
    answers = Answers()
    retention = Retention(catalog, queue, 100.0, asks=answers)
    answers.said = {"kept/a": True, "kept/b": True}
    report = retention.sweep()
    assert (report.asked, report.missing, report.records) == (2, 2, 0)
    clock[0] += 99
    assert retention.sweep().records == 0
    clock[0] += 1
    report = retention.sweep()
    assert (report.names, report.records) == (3, 1)
    with pytest.raises(NotFoundError):
        catalog.image(known)
    assert all(queue.missing_since(name) is None for name in answers.asked)


def test_a_name_goes_alone_while_another_repository_has_the_image(known, catalog, queue, clock):
    answers = Answers()
    retention = Retention(catalog, queue, 100.0, asks=answers)
    answers.said = {"kept/a": True}
    retention.sweep()
    clock[0] += 100
    assert (retention.sweep().names, len(list(catalog.images()))) == (2, 1)
    assert [name.rpartition("/")[2] for name in catalog.image(known).names] == ["b:1"]


def test_a_name_that_is_added_while_the_last_one_goes_keeps_the_record(known, catalog, queue, clock):
    """As where an image is promoted while its repository for tests is cleaned up."""
    answers = Answers()
    answers.said = {"kept/a": True, "kept/b": True}
    Retention(catalog, queue, 100.0, asks=answers).sweep()
    clock[0] += 100
    promoted = "registry.example/prod:1"

    def promoting(ref, plain_http, registry_config):
        catalog.set_image(replace(catalog.image(known), names=(promoted,)))
        return answers(ref, plain_http, registry_config)

    report = Retention(catalog, queue, 100.0, asks=promoting).sweep()
    assert (report.names, report.records) == (0, 0)
    assert promoted in catalog.image(known).names
    assert Retention(catalog, queue, 100.0, asks=answers).sweep().names == 3
    assert catalog.image(known).names == (promoted,)


@pytest.mark.parametrize("told", [False, True])
def test_an_image_whose_tag_moved_on_goes_when_its_registry_deletes_it(
    make, indexer, catalog, queue, registry, tmp_path, clock, told
):
    """As an untagged manifest in the registry's own clean-up: found by a sweep, or told by the registry."""
    first, name = a_push(tmp_path, registry, "moves:main")
    queue.put(Job(name))
    indexer.run(drain=True)
    second = built(tmp_path / "second", {"etc/a": b"second"})
    push(second, registry.host, "moves:main")
    queue.put(Job(name))
    indexer.run(drain=True)
    by_digest = f"{registry.host}/moves@{first.manifest_digest}"
    assert catalog.image(first.manifest_digest).names == (by_digest,)
    retention = Retention(catalog, queue, 100.0, registry.config)
    assert retention.sweep().missing == 0
    _delete(registry, "moves", first)
    if told:
        deleted = {"action": "delete", "target": {"repository": "moves", "digest": first.manifest_digest}}
        with webhook(queue, tmp_path) as hook:
            assert post(hook, {"events": [{**deleted, "request": {"host": registry.host}}]}) == 202
        assert make(grace=100.0).run_one()
        assert queue.missing_since(by_digest) == clock[0]
    else:
        assert retention.sweep().missing == 1
    clock[0] += 100
    assert retention.sweep().records == 1
    assert [record.manifest_digest for record in catalog.images()] == [second.manifest_digest]


@pytest.mark.parametrize(
    "answer",
    [UnavailableError("away"), AccessDeniedError("no"), NotFoundError("404 of a proxy"), BadInputError("hosts.toml")],
)
def test_a_registry_that_says_nothing_has_deleted_nothing(known, catalog, queue, clock, answer):
    answers = Answers()
    retention = Retention(catalog, queue, 100.0, asks=answers)
    for said in (True, answer, answer):
        answers.said = dict.fromkeys(("kept/a", "kept/b"), said)
        report = retention.sweep()
        clock[0] += 1000
    assert (report.unanswered, report.records) == (2, 0)
    assert catalog.image(known)


def test_a_registry_that_cannot_be_reached_is_asked_once_in_a_sweep(known, catalog, queue, clock, caplog):
    for number in range(20):
        digest = f"sha256:{number:064x}"
        catalog.set_image(replace(catalog.image(known), manifest_digest=digest, names=(f"away.example/app{number}:1",)))
    asked = []

    def asks(ref, _plain_http, _registry_config):
        asked.append(ref.host)
        if ref.host == "away.example":
            raise UnavailableError("no route to host")
        return True

    retention = Retention(catalog, queue, 100.0, asks=asks)
    for _ in range(2):
        asked.clear()
        report = retention.sweep()
        assert asked.count("away.example") == 1
        clock[0] += 100
    assert (report.asked, report.missing, report.unanswered, report.records) == (22, 2, 20, 1)
    assert "; away.example could not be reached" in str(report)
    assert caplog.text.count("no route to host") == 2


def test_an_image_that_is_there_again_has_its_whole_grace_once_more(known, catalog, queue, clock):
    answers = Answers()
    retention = Retention(catalog, queue, 100.0, asks=answers)
    for said, passes in ((True, 99), (False, 99), (True, 99)):
        answers.said = dict.fromkeys(("kept/a", "kept/b"), said)
        retention.sweep()
        clock[0] += passes
    assert retention.sweep().records == 0
    clock[0] += 1
    assert retention.sweep().records == 1


def test_images_of_folders_stay(catalog, queue, indexer, tmp_path, clock):
    image = built(tmp_path / "local", {"a": b"a"})
    index_image(catalog, image.source, spool_dir=tmp_path)
    answers = Answers()
    Retention(catalog, queue, 100.0, asks=answers).sweep()
    assert answers.asked == []
    assert catalog.image(image.manifest_digest)


def test_a_registry_s_own_word(registry, tmp_path):
    """A real one: there, deleted, never there; and another server's 404."""
    image, name = a_push(tmp_path, registry, "word:1")
    ref = replace(parse_registry_ref(name), tag=None, digest=image.manifest_digest)

    def lacks(ref):
        with contextlib.closing(RegistryImage(ref, plain_http=True)) as found:
            return found.lacks_manifest()

    assert not lacks(ref)
    _delete(registry, "word", image)
    assert lacks(ref)
    with _answering(404, b"<html>not here</html>") as host, pytest.raises(NotFoundError, match="no word of a deletion"):
        lacks(replace(ref, host=host))
    with _answering(404, b'{"errors": [{"code": "NAME_UNKNOWN"}]}') as host, pytest.raises(NotFoundError):
        lacks(replace(ref, host=host))
    with _answering(503, b"") as host, pytest.raises(UnavailableError):
        lacks(replace(ref, host=host))


def _delete(registry, name, image):
    with contextlib.closing(http.client.HTTPConnection(registry.host)) as connection:
        connection.request("DELETE", f"/v2/{name}/manifests/{image.manifest_digest}")
        with connection.getresponse() as answer:
            assert answer.status == 202


@contextlib.contextmanager
def _answering(status, body):
    """A server that says the same to everybody; its HOST:PORT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_registry_tells_of_a_push_and_of_a_deletion_itself(make, catalog, queue, tmp_path):
    """The CNCF's distribution, with its own notifications."""
    with webhook(queue, tmp_path) as hook:
        own = Registry(tmp_path / "own", notify=("http://{}:{}/".format(*hook.address), SECRET))
        try:
            image, name = a_push(tmp_path, own, "told:1")
            plain = pushing.without_tls(tmp_path / "hosts", own.host)
            _until(lambda: queue.status().waiting)
            make(registry_config=plain).run(drain=True)
            assert catalog.image(image.manifest_digest).names == (name,)
            _delete(own, "told", image)
            _until(lambda: queue.status().waiting)
            task = queue.take("a")
            assert (task.job.action, task.job.ref) == (CHECK, f"{own.host}/told@{image.manifest_digest}")
            queue.give_back("a", task)
            careful = make(registry_config=plain, grace=1000.0)
            careful.run(drain=True)
            assert queue.missing_since(task.job.ref) is not None
            assert catalog.image(image.manifest_digest)
        finally:
            own.stop()


def _until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_work_that_is_to_stop_stops_at_the_next_byte(queue):
    queue.put(Job("registry.example/app:1"))
    held = Held(queue, "a", queue.take("a"), 600)
    stop = threading.Event()
    watch = Watch(held, stop)
    watch.advance(1)
    held.lost = True
    with pytest.raises(CancelledError, match="another indexer"):
        watch.advance(1)
    stop.set()
    with pytest.raises(CancelledError, match="being stopped"):
        watch.advance(1)
