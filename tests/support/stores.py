"""Object stores that fail in named ways, each around an inner one that works."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

from floe.store.errors import UnavailableError


class StoreWrapper:
    """Hands everything to `inner`; the base of the faults below, which change some of it."""

    def __init__(self, inner):
        self.inner = inner
        self.url = inner.url

    def get(self, key, start=0, length=None):
        return self.inner.get(key, start, length)

    async def get_async(self, key, start, length):
        return await self.inner.get_async(key, start, length)

    def open_range(self, key, start, length):
        raise UnavailableError("reads go through get, where the faults are")

    def get_versioned(self, key):
        return self.inner.get_versioned(key)

    def head(self, key):
        return self.inner.head(key)

    def put(self, key, data):
        self.inner.put(key, data)

    def put_file(self, key, path, progress=None):
        self.inner.put_file(key, path, progress)

    def put_if(self, key, data, version):
        return self.inner.put_if(key, data, version)

    def delete(self, key):
        self.inner.delete(key)

    def list(self, prefix):
        return self.inner.list(prefix)

    def close(self):
        self.inner.close()


class _ChangedReads(StoreWrapper):
    """Base of the stores whose reads arrive changed. `matches`: only keys that begin with it; `times`: then heal."""

    def __init__(self, inner, matches="", times=None):
        super().__init__(inner)
        self.matches = matches
        self.times = times
        self._lock = threading.Lock()

    def change(self, data):
        raise NotImplementedError

    def _maybe(self, key, data):
        if not key.startswith(self.matches) or not len(data):
            return data
        with self._lock:
            if self.times is not None:
                if self.times <= 0:
                    return data
                self.times -= 1
        return self.change(bytes(data))

    def get(self, key, start=0, length=None):
        return self._maybe(key, self.inner.get(key, start, length))

    async def get_async(self, key, start, length):
        return self._maybe(key, await self.inner.get_async(key, start, length))

    def get_versioned(self, key):
        data, version = self.inner.get_versioned(key)
        return self._maybe(key, data), version


class LastByteFlipStore(_ChangedReads):
    """Every read has its last byte flipped."""

    def change(self, data):
        return data[:-1] + bytes([data[-1] ^ 0xFF])


class TruncatingStore(_ChangedReads):
    """Every read loses its last byte, against the interface's promise."""

    def change(self, data):
        return data[:-1]


class SlowStore(StoreWrapper):
    """Reads wait `delay` seconds and, when given, for the threading.Event `gate`. `waiting` counts those that do."""

    def __init__(self, inner, delay=0.0, gate=None, matches=""):
        super().__init__(inner)
        self.delay = delay
        self.gate = gate
        self.matches = matches
        self.waiting = 0
        self._lock = threading.Lock()

    def _count(self, change):
        with self._lock:
            self.waiting += change

    def _wait(self, key):
        if not key.startswith(self.matches):
            return
        self._count(1)
        try:
            if self.delay:
                time.sleep(self.delay)
            if self.gate is not None:
                self.gate.wait()
        finally:
            self._count(-1)

    def get(self, key, start=0, length=None):
        self._wait(key)
        return self.inner.get(key, start, length)

    async def get_async(self, key, start, length):
        if key.startswith(self.matches):
            self._count(1)
            try:
                if self.delay:
                    await asyncio.sleep(self.delay)
                while self.gate is not None and not self.gate.is_set():  # noqa: ASYNC110 - set from another thread
                    await asyncio.sleep(0.005)
            finally:
                self._count(-1)
        return await self.inner.get_async(key, start, length)

    def get_versioned(self, key):
        self._wait(key)
        return self.inner.get_versioned(key)


class SilentStore(SlowStore):
    """Reads never answer until `release()`, but asynchronous ones that begin at `but_at`; those can be cancelled, too."""

    def __init__(self, inner, matches="", *, but_at=None):
        super().__init__(inner, gate=threading.Event(), matches=matches)
        self.but_at = but_at

    async def get_async(self, key, start, length):
        if start == self.but_at:
            return await self.inner.get_async(key, start, length)
        return await super().get_async(key, start, length)

    def release(self):
        self.gate.set()

    def silence(self):
        self.gate.clear()


class CountdownFailureStore(StoreWrapper):
    """The n-th call (1: the first) of an operation raises the error given for it, before anything is done.

    `fail_get={3: UnavailableError("...")}`; get, get_async and get_versioned count together. With `fail_put_after` the
    n-th put happens and then raises, as when the answer is lost.
    """

    def __init__(
        self,
        inner,
        *,
        fail_get=None,
        fail_put=None,
        fail_put_after=None,
        fail_list=None,
        fail_delete=None,
        fail_head=None,
    ):
        super().__init__(inner)
        self._before = {
            "get": fail_get or {},
            "put": fail_put or {},
            "list": fail_list or {},
            "delete": fail_delete or {},
            "head": fail_head or {},
        }
        self._after = fail_put_after or {}
        self.calls = dict.fromkeys(self._before, 0)
        self._lock = threading.Lock()

    def _count(self, operation):
        with self._lock:
            self.calls[operation] += 1
            number = self.calls[operation]
        if number in self._before[operation]:
            raise self._before[operation][number]
        return number

    def _put(self, call):
        number = self._count("put")
        result = call()
        if number in self._after:
            raise self._after[number]
        return result

    def get(self, key, start=0, length=None):
        self._count("get")
        return self.inner.get(key, start, length)

    async def get_async(self, key, start, length):
        self._count("get")
        return await self.inner.get_async(key, start, length)

    def get_versioned(self, key):
        self._count("get")
        return self.inner.get_versioned(key)

    def head(self, key):
        self._count("head")
        return self.inner.head(key)

    def put(self, key, data):
        self._put(lambda: self.inner.put(key, data))

    def put_file(self, key, path, progress=None):
        self._put(lambda: self.inner.put_file(key, path, progress))

    def put_if(self, key, data, version):
        return self._put(lambda: self.inner.put_if(key, data, version))

    def delete(self, key):
        self._count("delete")
        self.inner.delete(key)

    def list(self, prefix):
        self._count("list")
        return self.inner.list(prefix)


class UnreachableStore(StoreWrapper):
    """Nothing can be reached while `down`; counts the attempts."""

    def __init__(self, inner, *, down=True):
        super().__init__(inner)
        self.down = down
        self.attempts = 0

    def _check(self):
        self.attempts += 1
        if self.down:
            raise UnavailableError(f"{self.url} cannot be reached", hint="check the network")

    def get(self, key, start=0, length=None):
        self._check()
        return self.inner.get(key, start, length)

    async def get_async(self, key, start, length):
        self._check()
        return await self.inner.get_async(key, start, length)

    def get_versioned(self, key):
        self._check()
        return self.inner.get_versioned(key)

    def head(self, key):
        self._check()
        return self.inner.head(key)

    def put(self, key, data):
        self._check()
        self.inner.put(key, data)

    def put_file(self, key, path, progress=None):
        self._check()
        self.inner.put_file(key, path, progress)

    def put_if(self, key, data, version):
        self._check()
        return self.inner.put_if(key, data, version)

    def delete(self, key):
        self._check()
        self.inner.delete(key)

    def list(self, prefix):
        self._check()
        return self.inner.list(prefix)


@dataclass(frozen=True)
class Request:
    """One request: `length` is None for a read to the end and for what has no range; `got` bytes came or went."""

    op: str
    key: str
    start: int = 0
    length: int | None = None
    got: int = 0


@dataclass
class _Log:
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class RecordingStore(StoreWrapper):
    """Records every request once it succeeded, and counts bytes.

    Operations: get, get_async, get_versioned, head, put, put_file, put_if, delete, list. Failed ones count in `failed`.
    """

    def __init__(self, inner):
        super().__init__(inner)
        self._log = _Log()
        self.failed = 0

    @property
    def requests(self):
        with self._log.lock:
            return list(self._log.requests)

    @property
    def bytes_read(self):
        return sum(r.got for r in self.requests if r.op.startswith("get"))

    @property
    def bytes_written(self):
        return sum(r.got for r in self.requests if r.op.startswith("put"))

    def ops(self, op=None, prefix=""):
        """The requests of one operation (None: all; "get" and "put" stand for all their kinds) on keys below `prefix`."""
        return [r for r in self.requests if (op is None or r.op.startswith(op)) and r.key.startswith(prefix)]

    def clear(self):
        with self._log.lock:
            self._log.requests.clear()
            self.failed = 0

    def _add(self, *args):
        with self._log.lock:
            self._log.requests.append(Request(*args))

    def _run(self, call):
        try:
            return call()
        except Exception:
            with self._log.lock:
                self.failed += 1
            raise

    def get(self, key, start=0, length=None):
        data = self._run(lambda: self.inner.get(key, start, length))
        self._add("get", key, start, length, len(data))
        return data

    async def get_async(self, key, start, length):
        try:
            data = await self.inner.get_async(key, start, length)
        except Exception:
            with self._log.lock:
                self.failed += 1
            raise
        self._add("get_async", key, start, length, len(data))
        return data

    def get_versioned(self, key):
        data, version = self._run(lambda: self.inner.get_versioned(key))
        self._add("get_versioned", key, 0, None, len(data))
        return data, version

    def head(self, key):
        info = self._run(lambda: self.inner.head(key))
        self._add("head", key)
        return info

    def put(self, key, data):
        self._run(lambda: self.inner.put(key, data))
        self._add("put", key, 0, None, len(data))

    def put_file(self, key, path, progress=None):
        self._run(lambda: self.inner.put_file(key, path, progress))
        self._add("put_file", key, 0, None, path.stat().st_size)

    def put_if(self, key, data, version):
        fresh = self._run(lambda: self.inner.put_if(key, data, version))
        self._add("put_if", key, 0, None, len(data))
        return fresh

    def delete(self, key):
        self._run(lambda: self.inner.delete(key))
        self._add("delete", key)

    def list(self, prefix):
        found = self._run(lambda: list(self.inner.list(prefix)))
        self._add("list", prefix)
        return iter(found)


class Died(BaseException):
    """Not an error that anybody handles: the process is gone."""


class DyingStore(StoreWrapper):
    """Its process dies just before the n-th change (1: the first) of the store; from then on nothing reaches it."""

    def __init__(self, inner, dies_at):
        super().__init__(inner)
        self._left = dies_at - 1
        self._lock = threading.Lock()
        self.dead = False

    def _change(self, call):
        with self._lock:
            self.dead = self.dead or not self._left
            if self.dead:
                raise Died
            self._left -= 1
        return call()  # what others are in the midst of is still done, as a server would

    def _look(self, call):
        if self.dead:
            raise Died
        return call()

    def get(self, key, start=0, length=None):
        return self._look(lambda: self.inner.get(key, start, length))

    def get_versioned(self, key):
        return self._look(lambda: self.inner.get_versioned(key))

    def head(self, key):
        return self._look(lambda: self.inner.head(key))

    def list(self, prefix):
        return self._look(lambda: self.inner.list(prefix))

    def put(self, key, data):
        self._change(lambda: self.inner.put(key, data))

    def put_file(self, key, path, progress=None):
        self._change(lambda: self.inner.put_file(key, path, progress))

    def put_if(self, key, data, version):
        return self._change(lambda: self.inner.put_if(key, data, version))

    def delete(self, key):
        self._change(lambda: self.inner.delete(key))
