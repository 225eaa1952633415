"""What the queue of indexers promises, on a server alone, behind Sentinel, and in a cluster whose users may do no more."""

import contextlib
import json
import threading
import time
from dataclasses import replace

import pytest
from support import redis_server
from support.redis_server import RedisServer

from floe.store.errors import BadInputError, DamagedError, UnavailableError
from floe.store.index.jobs import CHECK, DONE, NODE, UNCHANGED, Job, open_queue
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.jobscripts import GROUP
from floe.store.index.redis.queue import RedisQueue

ONE, TWO = Job("registry.example/app:1", asked=1.0), Job("registry.example/app:2", origin=NODE, asked=2.0)
LONG = 600.0


def waited(condition):
    until = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@pytest.fixture(params=["standalone", "sentinel", "cluster"])
def place(request):
    server = getattr(redis_server, request.param)()
    server.empty()
    return server


@pytest.fixture
def opened(place):
    """Opens the queue as a user; `lease` is in seconds."""
    with contextlib.ExitStack() as stack:

        def make(lease=LONG, user="indexer", store="store-a"):
            url = place.url(user=user) if isinstance(place, redis_server.Cluster) else place.url()
            made = RedisQueue(RedisAddress.parse(url), store, lease=lease)
            stack.callback(made.close)
            return made

        yield make
    for node in getattr(place, "nodes", ()):
        assert node.ask("ACL LOG") == []


def counts(queue):
    found = queue.status()
    return found.waiting, found.working, found.retrying, found.failed


def test_a_job_is_taken_once_and_is_gone_when_it_is_done(opened):
    queue = opened()
    assert queue.take("a") is None
    assert queue.put(ONE)
    assert queue.put(TWO)
    assert counts(queue) == (2, 0, 0, 0)
    first, second = queue.take("a"), queue.take("b")
    assert (first.job, second.job) == (ONE, TWO)
    assert queue.take("c") is None
    assert counts(queue) == (0, 2, 0, 0)
    assert queue.finish("a", first, DONE)
    assert queue.finish("b", second, UNCHANGED)
    assert not queue.finish("a", first, DONE)
    assert counts(queue) == (0, 0, 0, 0)
    assert queue.status().counts == {DONE: 1, UNCHANGED: 1}


def test_what_waits_already_is_not_put_twice_and_what_is_worked_on_is(opened):
    queue = opened()
    assert queue.put(ONE)
    assert not queue.put(replace(ONE, origin=NODE))
    assert queue.put(replace(ONE, platform="linux/arm64"))
    assert queue.put(replace(ONE, action=CHECK))
    task = queue.take("a")
    assert queue.put(ONE)  # the tag may have moved since it was taken
    assert not queue.put(ONE)
    assert queue.finish("a", task, DONE)
    assert counts(queue) == (3, 0, 0, 0)


def test_who_asks_for_more_waits_beside_an_ordinary_job_of_the_image(opened, place):
    """A registry's news came first: the profile and plain HTTP that somebody asks for are not lost behind it."""
    queue = opened()
    more = [replace(ONE, lay_out="all"), replace(ONE, lay_out="none"), replace(ONE, plain_http=True)]
    more.append(replace(more[0], plain_http=True, platform="linux/arm64"))
    for job in (ONE, *more):
        assert queue.put(job)
        assert not queue.put(job)
    assert [queue.take("a").job for _ in range(5)] == [ONE, *more]
    with contextlib.closing(_administrator(place)) as client:
        # As put by a version that knew one key for all of them; an ordinary job's is the same still.
        old = {**ONE.__dict__, "plain_http": True, "key": "index registry.example/app:1"}
        ident = client.xadd(queue._stream, {"job": json.dumps(old)})
        client.hset(queue._wait, old["key"], ident)
    assert not queue.put(ONE)
    assert queue.take("a").job == more[2]
    assert queue.put(ONE)


def test_several_are_put_in_one_step(opened):
    queue = opened()
    queue.put(ONE)
    assert queue.put_all([ONE, TWO, replace(ONE, action=CHECK), TWO]) == 2
    assert queue.put_all([]) == 0
    assert [queue.take("a").job for _ in range(3)] == [ONE, TWO, replace(ONE, action=CHECK)]


def test_the_job_of_a_silent_worker_is_another_s_and_the_first_can_do_nothing_more(opened):
    queue = opened(lease=0.05)
    queue.put(ONE)
    first = queue.take("a")
    again = waited(lambda: queue.take("b"))
    assert (again.id, again.job, again.deliveries) == (first.id, ONE, 2)
    patient = opened()
    assert not patient.renew("a", first)
    assert not patient.finish("a", first, DONE)
    assert not patient.retry("a", first, ONE.failed("x"), 0)
    assert not patient.bury("a", first, ONE.failed("x"))
    assert not patient.give_back("a", first)
    assert counts(patient) == (0, 1, 0, 0)
    assert patient.finish("b", again, DONE)


def test_a_worker_that_speaks_keeps_its_job_and_no_attempt_is_counted(opened):
    queue, impatient = opened(), opened(lease=0.5)
    queue.put(ONE)
    task = queue.take("a")
    for _ in range(10):
        time.sleep(0.1)  # two leases in all
        assert queue.renew("a", task)
    impatient.lease_seconds = LONG
    assert impatient.take("b") is None
    impatient.lease_seconds = 0.0
    assert waited(lambda: impatient.take("b")).deliveries == 2


def test_every_silent_worker_s_job_is_found_behind_many_that_are_spoken_for(opened):
    """XAUTOCLAIM looks at ten entries a time."""
    queue = opened()
    for number in range(40):
        queue.put(Job(f"registry.example/app:{number}"))
    tasks = [queue.take(f"w{number}") for number in range(40)]
    silent = int(2000 * LONG)  # ms
    queue._call(lambda client: client.xclaim(queue._stream, GROUP, "w39", 0, [tasks[-1].id], idle=silent, justid=True))
    assert queue.take("x").id == tasks[-1].id
    assert queue.take("x") is None


def test_what_failed_is_tried_again_when_its_time_has_come(opened):
    queue = opened()
    queue.put(ONE)
    task = queue.take("a")
    assert queue.retry("a", task, ONE.failed("the registry is away"), LONG)
    assert queue.take("a") is None
    (failure,) = queue.status().failures
    assert (failure.job, failure.id) == (replace(ONE, tries=1, error="the registry is away"), "")
    assert 0 < failure.due <= LONG
    assert queue.put(ONE)  # news of it does not wait
    assert queue.retry("a", queue.take("a"), ONE.failed("twice"), 0.0)
    again = waited(lambda: queue.take("b"))
    assert (again.job.tries, again.deliveries) == (1, 1)
    assert counts(queue) == (0, 1, 1, 0)


def test_what_failed_over_a_file_whose_name_is_no_utf_8_is_tried_again(opened):
    queue = opened()
    queue.put(ONE)
    queue.retry("a", queue.take("a"), ONE.failed("cannot read caf\udce9"), 0.0)
    again = waited(lambda: queue.take("b"))
    assert again.job == replace(ONE, tries=1, error=r"cannot read caf\udce9")


def test_what_waits_again_and_is_asked_for_meanwhile_is_there_once(opened):
    queue = opened()
    queue.put(ONE)
    queue.retry("a", queue.take("a"), ONE.failed("x"), 0.2)
    queue.put(ONE)
    time.sleep(0.3)
    assert queue.take("a").job == ONE
    assert queue.take("a") is None


def test_what_is_given_back_is_the_next_one_s_at_once(opened):
    queue = opened()
    queue.put(ONE)
    assert queue.give_back("a", queue.take("a"))
    task = queue.take("b")
    assert (task.job, task.deliveries) == (ONE, 1)


def test_what_is_given_up_is_listed_with_its_reason_and_can_be_put_back(opened):
    queue = opened()
    for job in (ONE, TWO):
        queue.put(job)
        assert queue.bury("a", queue.take("a"), job.failed("no such image"))
    found = queue.status()
    assert (found.failed, found.counts) == (2, {"failed": 2})
    assert [(one.job.ref, one.job.error, one.due) for one in found.failures] == [
        (TWO.ref, "no such image", None),
        (ONE.ref, "no such image", None),
    ]
    assert queue.take("a") is None
    assert queue.revive([found.failures[0].id]) == 1
    task = queue.take("a")
    assert (task.job.ref, task.job.tries, task.job.error) == (TWO.ref, 0, "")
    assert queue.revive() == 1
    assert queue.revive() == 0
    assert counts(queue) == (1, 1, 0, 0)


NO_JOBS = (
    b'{"ref": "x", "action": "dance"}',
    *(b'{"key": %s}' % key for key in (b"true", b"null", b"{}", b"1", b'"x"')),
    *(b'"x"', b"[]", b"{}", b"", b"\xff", ONE.encode()[:-20], ONE.encode().replace(b"registry", b"\\ud800")),
)


@pytest.mark.parametrize("where", ["stream", "due"])
def test_what_is_no_job_is_told_as_such_and_can_be_given_up(opened, place, where):
    """However it is malformed: it keeps nobody from the jobs behind it."""
    queue = opened()
    queue.put(ONE)
    queue.finish("a", queue.take("a"), DONE)
    with contextlib.closing(_administrator(place)) as client:
        for data in NO_JOBS:
            if where == "stream":
                client.xadd(queue._stream, {"job": data})
            else:
                client.zadd(queue._due, {data: 1})
    taken = []
    for _ in NO_JOBS:
        task = queue.take("a")
        assert task.job is None
        assert queue.bury("a", task, None)
        taken.append(task.data)
    assert sorted(taken) == sorted(NO_JOBS)
    queue.put(ONE)
    assert queue.take("a").job == ONE
    assert queue.take("a") is None
    assert counts(queue) == (0, 1, 0, len(NO_JOBS))
    assert [failure.job for failure in queue.status().failures] == [None] * len(NO_JOBS)
    assert queue.revive() == 0  # nobody can say what it was
    with pytest.raises(DamagedError, match="no job"):
        Job.decode(b'{"ref": "x", "action": "dance"}')


def test_a_queue_that_was_lost_begins_anew(opened, place):
    queue = opened()
    queue.put(ONE)
    task = queue.take("a")
    place.empty()
    assert not queue.finish("a", task, DONE)
    assert not queue.renew("a", task)
    assert queue.take("a") is None
    assert queue.put(ONE)
    assert queue.take("a").job == ONE


@pytest.mark.parametrize("how", ["put", "due", "revive"])
def test_a_job_whose_stream_alone_was_lost_waits_again_when_it_is_asked_for(opened, place, how):
    """As by an eviction, or by keys that are deleted one by one while Floe runs."""
    queue = opened()
    assert queue.put_all([ONE, TWO]) == 2
    assert queue.bury("a", queue.take("a"), ONE)
    assert queue.put(ONE)
    with contextlib.closing(_administrator(place)) as client:
        client.delete(queue._stream)
        assert queue.put(replace(TWO, asked=time.time() - 3600))  # the stream is there again, what waited in it is not
        assert 3600 <= queue.status().lag < 3700
        if how == "put":
            assert queue.put(ONE)
            assert not queue.put(ONE)
        elif how == "due":
            client.zadd(queue._due, {ONE.encode(): 1})
        else:
            assert queue.revive() == 1
    assert [queue.take("a").job.ref for _ in range(2)] == [TWO.ref, ONE.ref]
    assert queue.take("a") is None
    assert queue.put(ONE)
    assert queue.take("a").job == ONE


def test_what_an_empty_stream_s_keys_still_name_is_forgotten(opened, place):
    queue = opened()
    queue.put(ONE)
    with contextlib.closing(_administrator(place)) as client:
        client.delete(queue._stream)
        assert queue.take("a") is None
        assert not client.exists(queue._wait)
        client.hset(queue._wait, ONE.key, "no id")
    assert queue.put(ONE)


def test_an_id_that_a_new_stream_gave_to_another_job_keeps_none_from_waiting(opened, place):
    """The first stream was lost in the same millisecond, or the server's clock was set back."""
    queue = opened()
    queue.put(ONE)
    with contextlib.closing(_administrator(place)) as client:
        ident = client.hget(queue._wait, ONE.key)
        client.delete(queue._stream)
        client.xadd(queue._stream, {"job": TWO.encode()}, id=ident)
    assert queue.put(ONE)
    assert [queue.take("a").job for _ in range(2)] == [TWO, ONE]


def test_a_worker_that_finds_nothing_forgets_nothing_that_waits(opened):
    """Jobs are put, taken and looked for in vain at once: each that was new is taken once, and no other is refused for ever."""
    queue, jobs = opened(), [Job(f"registry.example/app:{number}") for number in range(4)]
    new, taken, ended = [], [], threading.Event()

    def ask():
        mine = opened()
        new.extend(mine.put(jobs[number % 4]) for number in range(60))

    def work(name):
        mine = opened()
        while (task := mine.take(name)) or not ended.is_set():
            if task:
                taken.append(task.job)
                assert mine.finish(name, task, DONE)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    working = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(2)]
    for thread in (*asking, *working):
        thread.start()
    for thread in asking:
        thread.join()
    ended.set()
    for thread in working:
        thread.join()
    assert sum(new) == len(taken) > 4
    assert queue.put_all(jobs) == 4


def test_workers_are_listed_and_those_that_left_are_not(opened):
    queue = opened()
    queue.put(ONE)
    task = queue.take("a")
    queue.take("b")
    queue.leave("a")  # it holds a job, which would be lost with it
    assert [(one.name, one.jobs) for one in queue.status().workers] == [("a", 1), ("b", 0)]
    queue.leave("b")
    queue.finish("a", task, DONE)
    queue.leave("a")
    assert queue.status().workers == ()


def test_the_lag_is_the_age_of_the_oldest_that_waits(opened):
    queue = opened()
    assert queue.status().lag == 0
    queue.put(replace(ONE, asked=time.time() - 3600))
    queue.put(replace(TWO, asked=time.time() - 60))
    assert 3600 <= queue.status().lag < 3700
    task = queue.take("a")
    assert 60 <= queue.status().lag < 160
    queue.give_back("a", task)  # it waits again, behind the other one
    assert 3600 <= queue.status().lag < 3700


def test_stores_do_not_see_each_other_s_jobs(opened):
    mine, theirs = opened(store="a"), opened(store="b")
    mine.put(ONE)
    assert theirs.take("x") is None
    assert mine.try_lease(["l"], LONG) is not None
    assert theirs.try_lease(["l"], LONG) is not None


def test_many_workers_take_each_job_once(opened):
    queue = opened()
    for number in range(60):
        queue.put(Job(f"registry.example/app:{number}"))
    taken = []

    def work(name):
        mine = opened()
        while task := mine.take(name):
            taken.append(task.job.ref)
            assert mine.finish(name, task, DONE)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"registry.example/app:{number}" for number in range(60))
    assert queue.status().counts == {DONE: 60}


# Leases, turns, what is missing


def test_a_lease_is_all_its_names_or_none(opened):
    queue = opened()
    one = queue.try_lease(["b", "a"], LONG)
    assert one is not None
    assert queue.try_lease(["b", "c"], LONG) is None
    other = queue.try_lease(["c"], LONG)  # it was given back
    assert other is not None
    one.release()
    assert queue.try_lease(["a", "b"], LONG) is not None
    assert not other.lost


def test_a_lease_is_renewed_and_one_that_nobody_renews_ends(opened):
    queue = opened()
    lease = queue.try_lease(["a"], 3.0)
    time.sleep(4.0)
    assert not lease.lost
    assert queue.try_lease(["a"], LONG) is None
    lease._ended.set()  # as if the process had died
    lease._thread.join()
    other = waited(lambda: queue.try_lease(["a"], LONG))
    assert lease.lost
    lease.release()
    assert queue.try_lease(["a"], LONG) is None  # it is the other's
    other.release()


def test_a_lease_whose_server_forgot_it_is_lost(opened, place):
    queue = opened()
    lease = queue.try_lease(["a"], 0.6)
    place.empty()
    other = queue.try_lease(["a"], LONG)
    assert other is not None
    waited(lambda: lease.lost)
    lease.release()
    assert queue.try_lease(["a"], LONG) is None


def test_a_turn_comes_once_in_its_time(opened):
    queue = opened()
    assert queue.turn("sweep", LONG)
    assert not queue.turn("sweep", LONG)
    assert queue.turn("other", 0.01)
    assert waited(lambda: queue.turn("other", LONG))


def test_what_is_missing_is_remembered(opened):
    queue = opened()
    assert queue.missing_since("x") is None
    queue.set_missing("x", 12.5)
    assert queue.missing_since("x") == 12.5
    queue.set_missing("x", None)
    assert queue.missing_since("x") is None


# Users and addresses


def test_who_may_only_ask_can_ask_and_nothing_else():
    cluster = redis_server.cluster()
    cluster.empty()
    asking = RedisQueue(RedisAddress.parse(cluster.url(user="asking")), "store-a")
    node = RedisQueue(RedisAddress.parse(cluster.url(user="node")), "store-a")
    with contextlib.closing(asking), contextlib.closing(node):
        assert asking.put(ONE)
        assert not asking.put(ONE)
        with contextlib.closing(_administrator(cluster)) as client:
            client.delete(asking._stream)
        assert asking.put(TWO)
        assert asking.put(ONE)  # whoever lost it
        for forbidden in (lambda: asking.take("a"), lambda: asking.try_lease(["l"], 1), lambda: node.put(ONE)):
            with pytest.raises(UnavailableError, match="refused a command") as caught:
                forbidden()
            assert not caught.value.retryable
        with pytest.raises(UnavailableError, match="refused a command"):
            asking._call(lambda client: client.hset(asking._keys.packs(0), "x", "y"))
    cluster.empty()


@pytest.mark.parametrize("url", [None, "none", "sqlite:/tmp/x.db"])
def test_other_indexes_have_no_queue(url):
    with pytest.raises(BadInputError, match="has no queue") as caught:
        open_queue(url, "store-a")
    assert "redis://" in caught.value.hint


def test_a_server_that_went_away_is_unavailable_and_is_found_again(tmp_path):
    server = RedisServer(tmp_path / "server")
    try:
        with contextlib.closing(RedisQueue(RedisAddress.parse(server.url()), "store-a")) as queue:
            assert queue.put(ONE)
            server.stop()
            with pytest.raises(UnavailableError) as caught:
                queue.take("a")
            assert caught.value.retryable
            server.start()
            assert waited(lambda: _quiet(lambda: queue.put(ONE)))
            assert queue.take("a").job == ONE
    finally:
        server.stop()


def _quiet(call):
    try:
        return call()
    except UnavailableError:
        return None


def _administrator(place):
    if isinstance(place, redis_server.Cluster):
        return next(_owners(place))
    return (place.primary if isinstance(place, redis_server.Guarded) else place).client()


def _owners(cluster):
    """A connection to the node that has the queue's slot."""
    for node in cluster.nodes:
        client = node.client()
        try:
            client.exists(RedisQueue(RedisAddress.parse(cluster.url()), "store-a")._stream)
        except Exception:
            client.close()
            continue
        yield client
