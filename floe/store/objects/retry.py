"""Trying again, in one place: a wrapper around any object store that asks each error whether it is `retryable`."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from floe.store.errors import ConflictError, FloeError, ThrottledError
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectInfo, ObjectStore, Range

T = TypeVar("T")


class RetryingStore:
    """`inner`, with passing faults tried again until `deadline` seconds after an operation's start.

    The n-th pause is random between zero and `first_pause` * 2**n seconds, at most `longest_pause` ("full jitter"), so
    that a fleet does not come back in step. A store that asks us to slow down is given at least half of that.
    The last error is raised unchanged when no further attempt fits before the deadline.
    """

    def __init__(
        self, inner: ObjectStore, *, deadline: float = 60.0, first_pause: float = 0.1, longest_pause: float = 5.0
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self._deadline = deadline
        self._first_pause = first_pause
        self._longest_pause = longest_pause

    def _pause(self, error: FloeError, attempt: int, started: float) -> float:
        """Seconds to wait before attempt `attempt` (1: the second try); raises `error` when there is none."""
        if not error.retryable:
            raise error
        longest = min(self._longest_pause, self._first_pause * 2 ** min(attempt, 16))
        pause = random.uniform(longest / 2 if isinstance(error, ThrottledError) else 0, longest)
        if time.monotonic() + pause - started >= self._deadline:
            raise error
        return pause

    def _run(self, call: Callable[[], T]) -> T:
        started, attempt = time.monotonic(), 0
        while True:
            try:
                return call()
            except FloeError as error:
                attempt += 1
                time.sleep(self._pause(error, attempt, started))

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """See ObjectStore.get."""
        return self._run(lambda: self.inner.get(key, start, length))

    def open_range(self, key: str, start: int, length: int) -> Range:
        """See ObjectStore.open_range; tried once, since `get` is the other way."""
        return self.inner.open_range(key, start, length)

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """See ObjectStore.get_async."""
        started, attempt = time.monotonic(), 0
        while True:
            try:
                return await self.inner.get_async(key, start, length)
            except FloeError as error:
                attempt += 1
                await asyncio.sleep(self._pause(error, attempt, started))

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See ObjectStore.get_versioned."""
        return self._run(lambda: self.inner.get_versioned(key))

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore.head."""
        return self._run(lambda: self.inner.head(key))

    def put(self, key: str, data: Buffer) -> None:
        """See ObjectStore.put."""
        self._run(lambda: self.inner.put(key, data))

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """See ObjectStore.put_file; bytes sent again are not reported again."""
        reported = 0

        def attempt() -> None:
            sent = 0

            def advance(count: int) -> None:
                nonlocal sent, reported
                sent += count
                if progress is not None and sent > reported:
                    progress(sent - reported)
                    reported = sent

            self.inner.put_file(key, path, advance)

        self._run(attempt)

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if."""
        failed = False

        def attempt() -> str:
            nonlocal failed
            try:
                return self.inner.put_if(key, data, version)
            except ConflictError:
                # The attempt whose answer got lost may be the one that we now conflict with.
                if failed:
                    found, fresh = self.inner.get_versioned(key)
                    if found == bytes(data):
                        return fresh
                raise
            except FloeError:
                failed = True
                raise

        return self._run(attempt)

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        self._run(lambda: self.inner.delete(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list; a listing that breaks off is begun anew, without what was already given out."""
        seen: set[str] = set()
        started, attempt = time.monotonic(), 0
        while True:
            try:
                for info in self.inner.list(prefix):
                    if info.key not in seen:
                        seen.add(info.key)
                        yield info
                        started = time.monotonic()  # the deadline is for silence, not for a long listing
            except FloeError as error:
                attempt += 1
                time.sleep(self._pause(error, attempt, started))
            else:
                return

    def close(self) -> None:
        """See ObjectStore.close."""
        self.inner.close()
