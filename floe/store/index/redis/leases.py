"""Leases in Redis: names that one process of the fleet has at a time, for as long as it says that it lives."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from floe.store.errors import UnavailableError
from floe.store.index.redis import jobscripts as scripts

_log = logging.getLogger(__name__)
# In the time that a lease lasts, and while the servers do not answer. Servers that are away for half of that time then take no
# lease from anybody: a sixth may have passed before, the attempt that is under way when they are back may take a quarter to
# fail, and a twentieth passes until the next.
_RENEWALS, _ATTEMPTS = 6, 20


class RedisLease:
    """See Lease. A thread renews it; one that could not be renewed in time counts as lost, whatever the servers say later."""

    def __init__(self, call: Callable[[Callable[[Any], Any]], Any], keys: Sequence[str], seconds: float) -> None:
        """Nothing is taken yet: `take` does that."""
        self._call, self._keys, self._seconds = call, list(keys), seconds
        self._holder = secrets.token_hex(16)
        self._ended = threading.Event()
        self._lost = False
        self._until = 0.0  # time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="index-lease", daemon=True)

    @classmethod
    def take(
        cls, call: Callable[[Callable[[Any], Any]], Any], keys: Sequence[str], seconds: float
    ) -> RedisLease | None:
        """All of `keys`, in order, each for `seconds`; None, and none is held, when one is somebody else's."""
        made = cls(call, keys, seconds)
        held: list[str] = []
        try:
            asked = time.monotonic()
            for key in made._keys:
                held.append(key)  # also when the answer is lost; what is another's is not given up
                if not made._set(key):
                    break
            else:
                made._until = asked + seconds
                made._thread.start()
                return made
        except BaseException:
            made._give_up(held)
            raise
        made._give_up(held)
        return None

    @property
    def lost(self) -> bool:
        """See Lease.lost."""
        if time.monotonic() > self._until:
            self._lost = True
        return self._lost

    def release(self) -> None:
        """See Lease.release."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._give_up(self._keys)

    def __enter__(self) -> RedisLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _set(self, key: str) -> bool:
        return bool(self._call(lambda client: client.set(key, self._holder, nx=True, px=self._ms)))

    def _run(self, script: str, key: str, *more: int) -> Any:
        return self._call(lambda client: client.eval(script, 1, key, self._holder, *more))

    @property
    def _ms(self) -> int:
        return max(1, int(self._seconds * 1000))

    def _renew(self) -> None:
        pause, failing = self._seconds / _RENEWALS, False
        while not self._ended.wait(pause) and not self.lost:
            asked = time.monotonic()
            try:
                kept = [self._run(scripts.EXTEND, key, self._ms) for key in self._keys]
            except UnavailableError as error:
                if not failing:  # said once
                    _log.warning("a lease is not renewed, and is tried again while it lasts: %s", error)
                pause, failing = self._seconds / _ATTEMPTS, True
                continue
            if not all(kept):
                self._lost = True
                return
            self._until = asked + self._seconds
            pause, failing = self._seconds / _RENEWALS, False

    def _give_up(self, keys: Sequence[str]) -> None:
        """What cannot be given back expires."""
        for key in keys:
            try:
                self._run(scripts.RELEASE, key)
            except UnavailableError as error:
                _log.info("a lease is left to expire: %s", error)
                return
