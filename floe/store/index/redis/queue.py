"""The queue of indexers, and leases, in Redis; jobscripts.py has the keys and the steps.

What is in it may be lost like everything in an index: nodes ask again for what they still miss, registries and
`floe image index --queue` do not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from floe.store.errors import DamagedError
from floe.store.index.jobs import Failure, Job, QueueStatus, Task, Worker
from floe.store.index.redis import jobscripts as scripts
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.connecting import Server, connect
from floe.store.index.redis.faults import translate
from floe.store.index.redis.jobscripts import GROUP
from floe.store.index.redis.keys import Keys
from floe.store.index.redis.leases import RedisLease

T = TypeVar("T")
LEASE_SECONDS = 60.0  # of silence after which a worker's job is another's
FORGOTTEN_SECONDS = 86_400.0  # of silence after which a worker that holds nothing is no longer listed
_LOOKED_AT = 10  # of those that have waited for longest, for the lag: one may be no job


class RedisQueue:
    """See Queue. Connects when first used, and anew after a failure."""

    def __init__(self, address: RedisAddress, store_uuid: str, *, lease: float | None = None) -> None:
        self.url = address.shown
        self.lease_seconds = lease or LEASE_SECONDS
        self._address = address
        self._keys = Keys(address.prefix, store_uuid)
        self._lock = threading.Lock()  # guards _server; held while connecting
        self._server: Server | None = None
        self._stream, self._wait, self._due, self._dead, self._count, self._gone = (
            self._keys.jobs(part) for part in ("stream", "wait", "due", "dead", "count", "gone")
        )

    # Jobs

    def put(self, job: Job) -> bool:
        """See Queue.put."""
        return bool(self.put_all([job]))

    def put_all(self, wanted: Sequence[Job]) -> int:
        """See Queue.put_all."""
        words = [word for job in wanted for word in (job.key, job.encode())]
        return int(self._run(scripts.PUT, [self._stream, self._wait], *words))

    def take(self, worker: str) -> Task | None:
        """See Queue.take."""
        keys = [self._stream, self._wait, self._due]
        found = self._run(scripts.TAKE, keys, GROUP, worker, int(self.lease_seconds * 1000))
        if not found:
            return None
        ident, data, deliveries = found
        return Task(_text(ident), bytes(data), int(deliveries), _job(data))

    def renew(self, worker: str, task: Task) -> bool:
        """See Queue.renew."""
        return bool(self._run(scripts.RENEW, [self._stream], GROUP, worker, task.id))

    def finish(self, worker: str, task: Task, outcome: str) -> bool:
        """See Queue.finish."""
        return bool(self._run(scripts.FINISH, [self._stream, self._count], GROUP, worker, task.id, outcome))

    def retry(self, worker: str, task: Task, job: Job, delay: float) -> bool:
        """See Queue.retry."""
        keys = [self._stream, self._due, self._count]
        return bool(self._run(scripts.RETRY, keys, GROUP, worker, task.id, job.encode(), int(delay * 1000)))

    def give_back(self, worker: str, task: Task) -> bool:
        """See Queue.give_back."""
        return bool(self._run(scripts.GIVE_BACK, [self._stream], GROUP, worker, task.id, task.data))

    def bury(self, worker: str, task: Task, job: Job | None) -> bool:
        """See Queue.bury."""
        keys = [self._stream, self._dead, self._count]
        data = job.encode() if job else task.data
        return bool(self._run(scripts.BURY, keys, GROUP, worker, task.id, data, scripts.DEAD_MAX))

    def leave(self, worker: str) -> None:
        """See Queue.leave; workers silent for a day are forgotten with it."""
        self._run(scripts.LEAVE, [self._stream], GROUP, worker, int(FORGOTTEN_SECONDS * 1000))

    def revive(self, ids: Sequence[str] | None = None) -> int:
        """See Queue.revive; what is no job of this Floe's stays."""
        wanted = None if ids is None else set(ids)
        revived = 0
        for ident, values in self._call(lambda client: client.xrange(self._dead)):
            job = _job(values.get(b"job", b""))
            if job is None or (wanted is not None and _text(ident) not in wanted):
                continue
            fresh = Job(job.ref, job.action, job.platform, job.origin, job.lay_out, job.plain_http, time.time())
            keys = [self._stream, self._wait, self._dead]
            revived += int(self._run(scripts.REVIVE, keys, ident, fresh.key, fresh.encode()))
        return revived

    def status(self, most: int = 100) -> QueueStatus:
        """See Queue.status."""
        return self._call(lambda client: self._status(client, most))

    def _status(self, client: Any, most: int) -> QueueStatus:
        # These are several looks. In this order a job that ends meanwhile is counted as at work or as done, and never as waiting.
        counts = {_text(name): int(value) for name, value in client.hgetall(self._count).items()}
        # XINFO of what is not there is an error.
        groups = client.xinfo_groups(self._stream) if client.exists(self._stream) else []
        working = sum(int(group["pending"]) for group in groups if _text(group["name"]) == GROUP)
        length = int(client.xlen(self._stream))
        workers = client.xinfo_consumers(self._stream, GROUP) if groups else []
        now = time.time()
        # From the stream, and not by `wait`, of which a part may be lost, or left of what was.
        first = client.eval(scripts.WAITING, 1, self._stream, GROUP, _LOOKED_AT)
        oldest = [_job(value) for value in first]
        lag = max((now - job.asked for job in oldest if job is not None and job.asked), default=0.0)
        due = [
            Failure("", _job(data), max(0.0, float(score) / 1000 - now))
            for data, score in client.zrange(self._due, 0, most - 1, withscores=True)
        ]
        dead = [
            Failure(_text(ident), _job(values.get(b"job", b"")))
            for ident, values in client.xrevrange(self._dead, count=most)
        ]
        return QueueStatus(
            waiting=max(0, length - working),
            working=working,
            retrying=int(client.zcard(self._due)),
            failed=int(client.xlen(self._dead)),
            lag=max(0.0, lag),
            workers=tuple(Worker(_text(one["name"]), int(one["pending"]), int(one["idle"]) / 1000) for one in workers),
            failures=(*due, *dead),
            counts=counts,
            stream=self._stream,
        )

    # What the registry no longer has

    def missing_since(self, name: str) -> float | None:
        """See Queue.missing_since."""
        found = self._call(lambda client: client.hget(self._gone, name))
        return None if found is None else float(found)

    def set_missing(self, name: str, since: float | None) -> None:
        """See Queue.set_missing."""
        if since is None:
            self._call(lambda client: client.hdel(self._gone, name))
        else:
            self._call(lambda client: client.hset(self._gone, name, repr(since)))

    # Leases

    def turn(self, name: str, seconds: float) -> bool:
        """See Queue.turn."""
        key = self._keys.jobs(f"turn:{name}")
        return bool(self._call(lambda client: client.set(key, b"", nx=True, px=max(1, int(seconds * 1000)))))

    def try_lease(self, names: Sequence[str], seconds: float) -> RedisLease | None:
        """See Queue.try_lease."""
        return RedisLease.take(self._call, [self._keys.lease(name) for name in sorted(set(names))], seconds)

    def close(self) -> None:
        """See Queue.close."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.close()

    # Shared by the above

    def _run(self, script: str, keys: Sequence[str], *args: object) -> Any:
        return self._call(lambda client: client.eval(script, len(keys), *keys, *args))

    def _call(self, work: Callable[[Any], T]) -> T:
        server: Server | None = None
        try:
            server = self._connected()
            return work(server.client)
        except Exception as error:  # whatever the library raises
            told = translate(error, self.url)
            if told.retryable:
                self._drop(server)
            if told is error:
                raise
            raise told from error

    def _connected(self) -> Server:
        with self._lock:
            if self._server is None:
                self._server = connect(self._address)
            return self._server

    def _drop(self, server: Server | None) -> None:
        """Connect anew next time; other threads may still use the old connections, which go with their last user."""
        with self._lock:
            if server is not None and self._server is server:
                self._server = None


def _job(data: bytes) -> Job | None:
    try:
        return Job.decode(bytes(data))
    except DamagedError:
        return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else str(value)
