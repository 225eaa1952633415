"""Credentials that are looked up when they are wanted, and again when the server refuses them."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from floe.store.errors import FloeError

# obstore asks again for credentials that expire within five minutes: so it does every ten seconds. Asking their source
# costs microseconds, and a second or more when it tries to renew them and is not answered.
_TTL = timedelta(minutes=5, seconds=10)
# Of one request, when it is refused for its credentials: with those that others had found already, and with new ones.
ATTEMPTS = 3
# Seconds between two looks for other credentials: the first, doubled while the same ones come, at most the second.
_LOOK_AGAIN = 1.0
_LOOK_AGAIN_MOST = 8.0


class RenewableCredentials:
    """What a store's requests are made with; subclasses know the source. Thread-safe.

    `failure`: why there are none, or None.
    """

    def __init__(self) -> None:
        self.failure: FloeError | None = None
        self._lock = threading.Lock()  # held while the source is asked
        self._source: Any = None  # the library's own, once it was looked for
        self._look_at = 0.0  # time.monotonic() from when the source may be asked anew
        self._wait = 0.0  # seconds, after the last look in vain

    def current(self) -> Any:
        """The credentials, as the source gives them now. A FloeError says why there are none."""
        try:
            with self._lock:
                found = self._fetch()
        except Exception as error:
            self.failure = self._explain(error)
            raise self.failure from error
        self.failure = None
        return found

    def renew(self, refused: Any) -> bool:
        """Whether there are others now than those that the server `refused`; the source is asked anew if need be."""
        with contextlib.suppress(FloeError):
            if self.current() != refused:
                self._wait = 0.0
                return True
        with self._lock:
            if time.monotonic() < self._look_at:
                return False
            known, self._source = self._source, None
        try:
            if self.current() != refused:
                self._wait = 0.0
                return True
        except FloeError:
            with self._lock:  # what was refused may have been refused for another reason: better than none
                self._source, self.failure = known, None
        self._wait = min(max(_LOOK_AGAIN, 2 * self._wait), _LOOK_AGAIN_MOST)
        self._look_at = time.monotonic() + self._wait
        return False

    def form(self, current: Any) -> Any:
        """`current` as obstore wants credentials."""
        raise NotImplementedError

    def _fetch(self) -> Any:
        """Ask `_source`, having looked for it when that is None; it may keep what does not expire soon."""
        raise NotImplementedError

    def _explain(self, error: Exception) -> FloeError:
        """What a failed `_fetch` means."""
        raise NotImplementedError


class Supply:
    """What one of obstore's stores calls, from its own threads, for credentials; `last`: what it got last, or None."""

    def __init__(self, credentials: RenewableCredentials) -> None:
        self.last: Any = None
        self._credentials = credentials

    def __call__(self) -> Any:
        """Credentials for the next minutes."""
        self.last = self._credentials.current()
        return self._credentials.form(self.last)


def expiry() -> datetime:
    """What to tell obstore about when credentials expire, so that it asks for them often."""
    return datetime.now(timezone.utc) + _TTL
