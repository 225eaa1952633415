"""A store that lets something happen between the operations of whoever uses it."""

from __future__ import annotations

import threading

from support.stores import StoreWrapper


class SteppedStore(StoreWrapper):
    """Calls `before(operation, key)` before every operation, one at a time; listings are whole."""

    def __init__(self, inner, before):
        super().__init__(inner)
        self.before = before

    def get(self, key, start=0, length=None):
        self.before("get", key)
        return self.inner.get(key, start, length)

    def get_versioned(self, key):
        self.before("get", key)
        return self.inner.get_versioned(key)

    def head(self, key):
        self.before("head", key)
        return self.inner.head(key)

    def put(self, key, data):
        self.before("put", key)
        self.inner.put(key, data)

    def put_file(self, key, path, progress=None):
        self.before("put", key)
        self.inner.put_file(key, path, progress)

    def put_if(self, key, data, version):
        self.before("put", key)
        return self.inner.put_if(key, data, version)

    def delete(self, key):
        self.before("delete", key)
        self.inner.delete(key)

    def list(self, prefix):
        self.before("list", prefix)
        return iter(list(self.inner.list(prefix)))


class At:
    """Runs `action` before operation number `number` (0: the first), once; counts them in `count`."""

    def __init__(self, number, action):
        self._number, self._action = number, action
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, _operation, _key):
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self._number:
            self._action()


class Turns:
    """Two users of a store, `False` and `True`, take turns as `schedule` says; after its end, and once one is done, freely."""

    def __init__(self, schedule):
        self._schedule = iter(schedule)
        self._changed = threading.Condition()
        self._next = next(self._schedule, None)
        self._done = set()

    def of(self, user):
        def before(_operation, _key):
            with self._changed:
                self._changed.wait_for(lambda: self._next is None or self._next == user or (not user) in self._done)
                self._next = next(self._schedule, None)
                self._changed.notify_all()

        return before

    def run(self, user, action):
        try:
            action()
        finally:
            with self._changed:
                self._done.add(user)
                self._changed.notify_all()
