"""Several indexers as processes, killed at random: every image is indexed, none is lost, each is counted once."""

import contextlib
import os
import random
import time

import pytest
from support import images, pushing, redis_server
from support.floe_node import Node
from support.registry import Registry

from floe.indexer.worker import DELIVERIES
from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.index.jobs import DONE, UNCHANGED, Job
from floe.store.index.redis.jobscripts import GROUP
from floe.store.objects import open_store
from floe.upkeep.fsck import Checker


def fleet(tmp_path, indexers, count, kills, seed):
    """Index `count` images with so many indexers; `kills` times one that has a job in hand is killed and replaced, all along."""
    rng = random.Random(seed)
    registry = Registry(tmp_path / "registry")
    node = Node(tmp_path)
    node.environ |= {
        "FLOE_INDEX": redis_server.standalone().url(),
        "FLOE_REGISTRY_CONFIG": str(*pushing.without_tls(tmp_path / "hosts", registry.host)),
        "FLOE_STORE_TIMEOUT": "30",
    }
    with contextlib.ExitStack() as stack:
        stack.callback(registry.stop)
        base = rng.randbytes(300_000)
        wanted = {}
        for number in range(count):
            contents = [images.files({"base": base}), images.files({"own": rng.randbytes(20_000), "n": str(number)})]
            built = images.build_oci(tmp_path / f"image-{number}", contents, compression="none")
            name = pushing.push(built, registry.host, f"fleet/app{number}:1")
            wanted[name] = built
            if not number:
                node.floe("store", "init")
        catalog = Catalog(open_store(node.environ["FLOE_STORE"]), open_index(None))
        queue = stack.enter_context(contextlib.closing(pushing.open_jobs(catalog, node.environ["FLOE_INDEX"])))
        stack.callback(catalog.close)
        first, *others = wanted
        assert node.json("image", "index", "--queue", first) == {"queued": True}
        assert queue.put_all([Job(name) for name in others]) == len(others)
        log = tmp_path / "indexers.log"
        workers = []

        def end():
            for worker in workers:
                worker.kill()
                worker.wait()

        stack.callback(end)

        def start(number):
            environ = {**node.environ, "FLOE_SPOOL_DIR": str(tmp_path / f"spool-{number}")}
            return pushing.start_indexer(environ, log, lease=3.0)

        workers += [start(number) for number in range(indexers)]
        until = time.monotonic() + 600
        killed = 0
        while (done := _done(status := queue.status())) < count:
            assert time.monotonic() < until, log.read_text()[-4000:]
            assert not status.failed, status.failures
            working = _working(queue) if status.working else ()
            victims = [number for number, worker in enumerate(workers) if worker.pid in working]
            if victims and killed < kills and done >= killed * count * 4 // (kills * 5):
                victim = rng.choice(victims)
                workers[victim].kill()
                workers[victim].wait()
                workers[victim] = start(victim)
                killed += 1
            time.sleep(rng.uniform(0.0, 0.1))
        assert killed == kills
        counts = queue.status().counts
        assert _done(status) == count  # each once
        assert (status.waiting, status.working, status.retrying, status.failed) == (0, 0, 0, 0)
        records = {name: record for record in catalog.images() for name in record.names}
        assert records.keys() == wanted.keys()
        for name, built in wanted.items():
            assert records[name].manifest_digest == built.manifest_digest
            assert all(catalog.resolve_chain(chain) for chain in records[name].chain_ids)
        end()
        assert Checker(catalog, deep=True).run().faults == []
        # Each layer is stored once: nobody needs what else a killed indexer may have left.
        named = {
            pack.id for built in wanted.values() for diff in built.diff_ids for pack in catalog.layer(diff)[1].packs
        }
        stored = {info.key.rpartition("/")[2] for info in catalog.store.list("packs")}
        assert named <= stored
        return counts, len(stored - named)


def _done(status):
    return status.counts.get(DONE, 0) + status.counts.get(UNCHANGED, 0)


def _working(queue):
    """The pids of indexers that have a job in hand, but for jobs over which so many have died that another would be the last."""
    held = queue._call(lambda client: client.xpending_range(queue._stream, GROUP, "-", "+", 1000))
    return {int(one["consumer"].split(b":")[1]) for one in held if one["times_delivered"] < DELIVERIES - 1}


def test_three_indexers_and_some_of_them_killed(tmp_path):
    counts, _ = fleet(tmp_path, indexers=3, count=12, kills=3, seed=1)
    assert sum(counts.get(outcome, 0) for outcome in (DONE, UNCHANGED)) == 12


def test_indexers_that_are_left_alone_store_nothing_twice(tmp_path):
    counts, orphans = fleet(tmp_path, indexers=3, count=9, kills=0, seed=2)
    assert counts == {DONE: 9}
    assert orphans == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_indexers_a_hundred_images_and_kills_at_random(tmp_path):
    """FLOE_TEST_FLEET="3 20 5" for fewer indexers, images and kills, FLOE_TEST_SEED for other ones."""
    indexers, count, kills = map(int, os.environ.get("FLOE_TEST_FLEET", "10 100 40").split())
    fleet(tmp_path, indexers, count, kills, int(os.environ.get("FLOE_TEST_SEED", "3")))
