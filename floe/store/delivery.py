"""One request from its first byte to its last frame: downloaded, verified, handed out; again what did not match.

Damage in transit and damage at rest: a frame that does not match its digest is fetched again alone, then over another
connection; after that it counts as damaged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from floe.store import layout
from floe.store.blocks import Blocks
from floe.store.damage import HEALING
from floe.store.download import COUNTED as DOWNLOAD_COUNTED
from floe.store.download import Downloader
from floe.store.errors import DamagedError, TransitDamageError
from floe.store.frames import VerifiedFrame, decode_frame
from floe.store.framestream import FrameStream, Open
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.reading import Get

_log = logging.getLogger(__name__)

_TRIES = 3  # of a frame that does not match its digest
_DECODERS = 3  # threads
_STREAMS = 32  # requests whose answers are read frame by frame, each in a thread
_STREAM_MIN = 1 << 20  # bytes; smaller answers are not worth a thread, of these there may be hundreds
COUNTED = (*DOWNLOAD_COUNTED, "transit_damage", "damaged")


class Receiver(Protocol):
    """Who the frames are for; called in the event loop."""

    def arrived(self, get: Get, number: int, frame: VerifiedFrame) -> None:
        """A frame is here."""
        ...

    def damaged(self, get: Get, number: int, error: DamagedError) -> None:
        """A frame will not come: it is damaged at rest."""
        ...


class Delivery:
    """Requests to `store` for `receiver` in `loop`, counted in `counts` (keys COUNTED)."""

    def __init__(
        self,
        store: ObjectStore,
        counts: dict[str, int],
        loop: asyncio.AbstractEventLoop,
        receiver: Receiver,
    ) -> None:
        self._url = store.url
        self._counts = counts
        self._loop = loop
        self._receiver = receiver
        self._downloader = Downloader(store, counts)
        self._blocks = Blocks()
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="floe-decode")
        self._open_range: Open | None = getattr(store, "open_range", None)
        self._streams = ThreadPoolExecutor(_STREAMS, thread_name_prefix="floe-stream")
        self._streaming = 0

    @property
    def errors(self) -> dict[str, int]:
        """Requests that failed, by cause; see errorkinds.kind_of."""
        return self._downloader.errors

    async def run(self, get: Get) -> None:
        """Deliver every frame of `get`, or say that it is damaged. Raises what `Downloader.download` raises but damage."""
        failed = await self._attempt(get, get.first, get.count, again=0)
        if failed:
            get.error = TransitDamageError(f"content of pack {get.pack_id} did not match its digest on arrival")
        for frame in failed:
            for again in range(1, _TRIES):
                if not await self._attempt(get, frame, 1, again=again):
                    break
            else:
                self._give_up(get, frame)

    def close(self) -> None:
        """Wait for frames that are being verified; begin nothing more. No `run` may be under way."""
        self._decoders.shutdown()
        self._streams.shutdown()
        self._downloader.close()

    async def _attempt(self, get: Get, first: int, count: int, *, again: int) -> list[int]:
        """Fetch, verify and hand out frames; the numbers of those that did not match."""
        failed: list[int] = []
        if not again and self._may_stream(get, first, count):
            passed, failed = await self._stream(get, first, count)
            first, count = first + passed, count - passed
        return failed + (await self._download(get, first, count, again=again) if count else [])

    def _may_stream(self, get: Get, first: int, count: int) -> bool:
        large = get.table.stored_range(first, count)[1] >= _STREAM_MIN
        return self._open_range is not None and large and self._streaming < _STREAMS

    async def _stream(self, get: Get, first: int, count: int) -> tuple[int, list[int]]:
        """Frames as they come, from the first on: how many came, and the numbers of those that did not match."""
        assert self._open_range is not None
        key = layout.pack_key(get.pack_id)
        arrived = functools.partial(self._tell, self._receiver.arrived, get)
        stream = FrameStream(
            get, first, count, key=key, open_range=self._open_range, blocks=self._blocks, arrived=arrived
        )
        try:
            running = self._streams.submit(stream.run)
        except RuntimeError as error:  # no more threads just now: as one answer, then
            _log.warning("a request is not streamed: %s", error)
            stream.abort()
            return 0, []
        self._streaming += 1
        # Not when this task ends: a thread may be connecting still, and nobody should queue behind it.
        running.add_done_callback(lambda _: self._tell(self._stream_ended))
        try:
            await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            stream.abort()
            raise
        finally:
            self._counts[f"{get.source}_bytes"] += stream.received
            self._counts[f"{get.source}_requests"] += stream.received > 0
            if stream.error is not None:
                get.error = stream.error
        return stream.passed, stream.failed

    def _stream_ended(self) -> None:
        self._streaming -= 1

    async def _download(self, get: Get, first: int, count: int, *, again: int) -> list[int]:
        failed: list[int]
        try:
            data = await self._downloader.download(get, first, count, another_way=again == _TRIES - 1)
        except (DamagedError, TransitDamageError):
            failed = list(range(first, first + count))  # the object is too short for some of these
        else:
            failed = await self._loop.run_in_executor(self._decoders, self._decode, get, data, first, count)
        if again or count == 1:
            self._counts["transit_damage"] += len(failed)
        return failed

    def _decode(self, get: Get, data: Buffer, first: int, count: int) -> list[int]:
        """In a thread: verify frames one by one, hand each out."""
        failed = []
        base, _ = get.table.stored_range(first)
        view = memoryview(data)
        for frame in range(first, first + count):
            start, size = get.table.stored_range(frame)
            stored = view[start - base : start - base + size]
            try:
                length = get.table.content_length(frame)
                verified = decode_frame(stored, get.table.entry(frame), length, self._blocks.take(length))
            except TransitDamageError as error:
                _log.warning("frame %d of pack %s: %s", frame, get.pack_id, error)
                failed.append(frame)
                continue
            self._tell(self._receiver.arrived, get, frame, verified)
        return failed

    def _give_up(self, get: Get, number: int) -> None:
        error = DamagedError(
            f"frame {number} of pack {get.pack_id} in {self._url} does not match its digest, read {_TRIES} times",
            hint=HEALING,
        )
        _log.error("%s; %s", error, error.hint)
        self._counts["damaged"] += 1
        self._receiver.damaged(get, number, error)

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        """Run `call` in the loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(call, *args)
