"""The connection of one index: made in the background, shared by all threads, made anew after a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from floe.store.errors import DeadlineError, UnavailableError
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.errors import ConnectingError

if TYPE_CHECKING:
    from floe.store.index.redis.connecting import Server


class Link:
    """Thread-safe. Nothing is connected before it is asked for, and never more than one attempt is under way."""

    def __init__(self, address: RedisAddress, limit: float) -> None:
        self._address = address
        self._limit = limit  # seconds after which an attempt counts as failed; it may hang in a name server for longer
        self._lock = threading.Lock()
        self._attempt: _Attempt | None = None

    def server(self, patience: float) -> Server:
        """The connected server. ConnectingError when the attempt under way is older than `patience` seconds.

        UnavailableError when it failed, or takes longer than the limit.
        """
        with self._lock:
            attempt = self._attempt
            if attempt is None:
                attempt = self._attempt = _Attempt(self._address)
        attempt.done.wait(max(0.0, attempt.started + patience - time.monotonic()))
        if attempt.server is not None:
            return attempt.server
        if attempt.failure is not None:
            self._forget(attempt)  # the next to ask begins another
            raise attempt.failure
        if patience < self._limit and time.monotonic() - attempt.started < self._limit:
            raise ConnectingError(f"index {self._address.shown} is being connected to")
        raise DeadlineError(
            f"index {self._address.shown} cannot be connected to within {self._limit:.0f} s",
            hint="check the server, its name and the network",
        )

    def drop(self, server: Server) -> None:
        """After a failure of `server`: connect anew, since what answers there may have become something else.

        Its connections are not closed, as other threads may use them; they go with its last user.
        """
        with self._lock:
            if self._attempt is not None and self._attempt.server is server:
                self._attempt = None

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()

    def _forget(self, attempt: _Attempt) -> None:
        with self._lock:
            if self._attempt is attempt:
                self._attempt = None


class _Attempt:
    """One way to a Server; either `server` or `failure` is set once `done` is."""

    def __init__(self, address: RedisAddress) -> None:
        self.started = time.monotonic()
        self.done = threading.Event()
        self.server: Server | None = None
        self.failure: UnavailableError | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(address,), name="index-connect", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            server = self.server
        if server is not None:
            server.close()

    def _run(self, address: RedisAddress) -> None:
        connect: Callable[[RedisAddress], Server]
        try:
            from floe.store.index.redis.connecting import connect  # noqa: PLC0415 - slow: only who uses it pays

            server = connect(address)
            with self._lock:
                self.server, closed = server, self._closed
            if closed:
                server.close()
        except UnavailableError as error:
            self.failure = error
        except Exception as error:
            self.failure = UnavailableError(f"index {address.shown} cannot be connected to: {error}")
        finally:
            self.done.set()
