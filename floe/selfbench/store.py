"""The object store, read: how long a small GET takes, and what ranges give over more and more connections.

Reads objects that are there. Nothing is written, so credentials that may only read are enough.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from floe.selfbench.disk import drop_pages
from floe.selfbench.figures import BOUNDED, GREW_NO_MORE, MOST, Step, Store, percentile
from floe.selfbench.plan import CONNECTIONS, Plan
from floe.store.objects.base import ObjectStore

GET_BYTES = 4096
_GETS = 200  # at most; a 99th percentile of fewer is their largest but one or two
_GROWTH = 1.1  # less than that over half the connections is no growth
_PLENTY = 0.9  # of the best rate

Range = tuple[str, int, int]
"""Key, offset and length of a GET, in bytes."""


@dataclass(frozen=True)
class Source:
    """An object to read: its key and size in bytes."""

    key: str
    size: int


def find_objects(store: ObjectStore, prefix: str, wanted: int, *, looked_at: int = 1000) -> list[Source]:
    """The largest of the first objects below `prefix`, until `wanted` bytes are together. The store's errors."""
    found = [Source(info.key, info.size) for info in itertools.islice(store.list(prefix), looked_at)]
    return enough(found, wanted)


def forget(store: ObjectStore, objects: Iterable[Source]) -> None:
    """Have this machine's page cache forget `objects` of a store in a folder: its disk is to be measured, and not memory."""
    root = getattr(getattr(store, "inner", store), "root", None)
    if isinstance(root, Path):
        for source in objects:
            with suppress(OSError):
                drop_pages(root / source.key)


def enough(objects: Iterable[Source], wanted: int) -> list[Source]:
    """The largest of `objects`, until `wanted` bytes are together."""
    chosen: list[Source] = []
    for source in sorted(objects, key=lambda source: -source.size):
        if source.size < GET_BYTES or sum(one.size for one in chosen) >= wanted:
            break
        chosen.append(source)
    return chosen


def cut(objects: Sequence[Source], length: int) -> list[Range]:
    """All of `objects` as ranges of `length` bytes, the last of each left out when shorter; never nothing. Pure."""
    ranges = [(source.key, start, length) for source in objects for start in range(0, source.size - length + 1, length)]
    return ranges or [(source.key, 0, source.size) for source in objects]


def measure(
    store: ObjectStore, objects: Sequence[Source], plan: Plan, drop: Callable[[], None] = lambda: None
) -> Store:
    """Read `objects`, at least one; `drop` is called before each part of it, to empty this machine's page cache of them.

    The store's errors.
    """
    chooser = random.Random(os.urandom(8))
    drop()
    waits = _latencies(store, objects, plan, chooser)
    ranges = cut(objects, plan.range_bytes)
    chooser.shuffle(ranges)
    endless = itertools.cycle(ranges)
    steps: list[Step] = []
    shares: list[float] = []
    ended = MOST
    for connections in CONNECTIONS:
        if connections * plan.range_bytes > plan.step_bytes:
            ended = BOUNDED
            break
        drop()
        cpu = time.process_time()
        step = asyncio.run(_step(store, endless, connections, plan))
        steps.append(step)
        shares.append((time.process_time() - cpu) / step.seconds / (os.cpu_count() or 1))
        if grew_no_more([one.bytes_per_second for one in steps]):
            ended = GREW_NO_MORE
            break
    rates = [step.bytes_per_second for step in steps]
    best = max(rates)
    total = sum(source.size for source in objects)
    return Store(
        url=store.url,
        objects=len(objects),
        objects_bytes=total,
        repeated=sum(step.bytes for step in steps) > total,
        get_bytes=GET_BYTES,
        gets=len(waits),
        get_median_seconds=percentile(waits, 0.5),
        get_p99_seconds=percentile(waits, 0.99),
        range_bytes=sum(length for _, _, length in ranges) // len(ranges),
        steps=tuple(steps),
        ended=ended,
        saturates_at=saturates_at(steps),
        single_connection_bytes_per_second=rates[0],
        best_bytes_per_second=best,
        client_cpu_share=min(1.0, shares[rates.index(best)]),
    )


def grew_no_more(rates: Sequence[float]) -> bool:
    """Whether the last two steps gave no tenth more than the best before them: once may be chance. Pure."""
    return len(rates) > 2 and max(rates[-2:]) < _GROWTH * max(rates[:-2])


def saturates_at(steps: Sequence[Step]) -> int:
    """The fewest connections that give nine tenths of the best rate. Pure."""
    best = max(step.bytes_per_second for step in steps)
    return next(step.connections for step in steps if step.bytes_per_second >= _PLENTY * best)


def _latencies(store: ObjectStore, objects: Sequence[Source], plan: Plan, chooser: random.Random) -> list[float]:
    waits: list[float] = []
    until = time.monotonic() + plan.latency_seconds
    store.get(objects[0].key, 0, GET_BYTES)  # connects
    while len(waits) < _GETS and (not waits or time.monotonic() < until):
        source = chooser.choice(objects)
        start = chooser.randrange(source.size - GET_BYTES + 1) // GET_BYTES * GET_BYTES
        begun = time.perf_counter()
        store.get(source.key, start, GET_BYTES)
        waits.append(time.perf_counter() - begun)
    return waits


async def _step(store: ObjectStore, ranges: Iterator[Range], connections: int, plan: Plan) -> Step:
    """GETs of `ranges`, `connections` at once, until time or bytes are used up; those begun are waited for."""
    taken = done = 0
    begun = last = time.perf_counter()

    async def read_on() -> None:
        nonlocal taken, done, last
        while taken < plan.step_bytes and (not taken or time.perf_counter() - begun < plan.step_seconds):
            key, start, length = next(ranges)
            taken += length
            done += len(await store.get_async(key, start, length))
            last = time.perf_counter()

    readers = [asyncio.ensure_future(read_on()) for _ in range(connections)]
    try:
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return Step(connections, done, last - begun, done / max(last - begun, 1e-9))
