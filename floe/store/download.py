"""One ranged request, tried until its store answers or nobody waits any more."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from floe.store import layout
from floe.store.errorkinds import KINDS, kind_of
from floe.store.errors import FloeError, ThrottledError, TransitDamageError, UnavailableError
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.reading import Get

_log = logging.getLogger(__name__)

_PAUSE_FIRST, _PAUSE_MAX = 0.1, 5.0  # seconds between attempts at an unreachable store
_OTHERS = 2  # threads for requests over the store's other client
COUNTED = ("store_requests", "store_bytes", "readahead_requests", "readahead_bytes", "store_errors")


class Downloader:
    """Requests to `store`, counted in `counts` (keys COUNTED), on behalf of one event loop."""

    def __init__(self, store: ObjectStore, counts: dict[str, int]) -> None:
        self._store = store
        self._counts = counts
        self.errors: Counter[str] = Counter(dict.fromkeys(KINDS, 0))  # failed requests by cause
        self._others = ThreadPoolExecutor(_OTHERS, thread_name_prefix="floe-other")

    async def download(self, get: Get, first: int, count: int, *, another_way: bool) -> Buffer:
        """Frames [first, first + count) as stored. `another_way`: not over the connection used before.

        Passing faults are tried again until the task is cancelled, since the last of its reads came to its deadline; a
        request that nobody asked for gives up at once. Raises what does not pass: NotFoundError, AccessDeniedError,
        DamagedError (the object is too short), TransitDamageError.
        """
        key = layout.pack_key(get.pack_id)
        start, length = get.table.stored_range(first, count)
        attempt = 0
        while True:
            try:
                self._counts[f"{get.source}_requests"] += 1
                data = await self._get(key, start, length, another_way=another_way)
            except FloeError as error:
                self.errors[kind_of(error)] += 1
                if not error.retryable or isinstance(error, TransitDamageError):
                    raise
                get.error = error
            except (OSError, RuntimeError, ValueError) as error:
                _log.warning("fetching %s failed: %r", key, error)
                self.errors["unavailable"] += 1
                get.error = UnavailableError(f"fetching {key} from {self._store.url} failed: {error!r}")
            else:
                self._counts[f"{get.source}_bytes"] += len(data)
                return data
            self._counts["store_errors"] += 1
            if get.ahead and not get.wanted:
                raise get.error
            longest = min(_PAUSE_MAX, _PAUSE_FIRST * 2 ** min(attempt, 10))
            # As RetryingStore does it: a store that asks us to slow down is given some time.
            await asyncio.sleep(random.uniform(longest / 2 if isinstance(get.error, ThrottledError) else 0, longest))
            attempt += 1

    async def _get(self, key: str, start: int, length: int, *, another_way: bool) -> Buffer:
        if not another_way:
            return await self._store.get_async(key, start, length)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._others, self._store.get, key, start, length)

    def close(self) -> None:
        """Begin nothing more."""
        self._others.shutdown(wait=False, cancel_futures=True)
