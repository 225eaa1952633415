"""Indexes of packs that are mounted, but on no disk of this node any more: out of the store, as at the mount.

A disk that fails may take them, and a node that starts anew then has them in memory neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeAlias

from floe.store import layout
from floe.store.cache import Writer
from floe.store.errors import CancelledError, DamagedError, FloeError, NotFoundError
from floe.store.frames import FrameTable
from floe.store.ids import is_hexdigest
from floe.store.objects.base import ObjectStore
from floe.store.objects.retry import RetryingStore
from floe.store.packindex import INDEX_HEADER_BYTES, index_bytes

_TRIES = 2  # of what arrives damaged

Found: TypeAlias = "Callable[[FrameTable | FloeError], None]"


class LostIndexes:
    """Part of a fetcher, in its event loop `loop`; `executor` waits for the cache's disks. `deadline` in seconds."""

    def __init__(
        self,
        store: ObjectStore,
        writer: Writer,
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        *,
        deadline: float,
    ) -> None:
        self._store = RetryingStore(store, deadline=deadline)
        self._writer = writer
        self._loop = loop
        self._executor = executor
        self._tasks: dict[str, asyncio.Task[FrameTable]] = {}

    def fetch(self, pack_id: str, found: Found) -> None:
        """Call `found` with the pack's frames or the error, once; one request serves all who ask meanwhile."""
        task = self._tasks.get(pack_id)
        if task is None:
            task = self._tasks[pack_id] = self._loop.create_task(self._fetch(pack_id))
            task.add_done_callback(lambda _: self._tasks.pop(pack_id, None))
        task.add_done_callback(lambda ended: found(_result(pack_id, ended)))

    async def _fetch(self, pack_id: str) -> FrameTable:
        if not is_hexdigest(pack_id):
            raise NotFoundError(f"there is no pack {pack_id!r}: that is no pack's id", hint="mount its tree again")
        for _ in range(_TRIES - 1):
            try:
                return await self._attempt(pack_id)
            except DamagedError:
                continue  # perhaps on its way only
        return await self._attempt(pack_id)

    async def _attempt(self, pack_id: str) -> FrameTable:
        key = layout.pack_index_key(pack_id)
        try:
            header = bytes(await self._store.get_async(key, 0, INDEX_HEADER_BYTES))
            rest = index_bytes(header, pack_id) - INDEX_HEADER_BYTES
            data = header + await self._store.get_async(key, INDEX_HEADER_BYTES, rest)
        except NotFoundError as error:
            raise NotFoundError(
                f"the index of pack {pack_id} is neither on this node nor in {self._store.url}",
                hint="push its model or index its image again",
            ) from error
        return await self._loop.run_in_executor(self._executor, self._writer.learn, pack_id, data)

    async def stop(self) -> None:
        """Give up."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _result(pack_id: str, task: asyncio.Task[FrameTable]) -> FrameTable | FloeError:
    if task.cancelled():
        return CancelledError("the pack reader was stopped")
    problem = task.exception()
    if problem is None:
        return task.result()
    if isinstance(problem, FloeError):
        return problem
    return FloeError(f"the index of pack {pack_id} could not be fetched: {problem!r}", hint="report this")
