"""A TCP proxy in this process that makes a server slow: latency for each request, a rate for all answers, or silence.

`latency` in seconds and `rate` in bytes a second (None: as fast as it goes) may be changed at any time; so may `breaks`, which says
whether, and after which share of an answer's bytes, connections break (None: never), for the next `breaks_times` answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

_PIECE = 64 << 10
_LIMIT = 10.0  # seconds for the proxy's own thread to begin or end


class SlowProxy:
    """Listens on a port of loopback, `address`, and hands everything on to `upstream`, (host, port)."""

    def __init__(self, upstream: tuple[str, int], *, latency: float = 0.0, rate: float | None = None) -> None:
        self.latency = latency
        self.rate = rate
        self.breaks: float | None = None
        self.breaks_times = 1 << 30
        self.passed = 0  # bytes of answers
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._go = asyncio.Event()
        self._go.set()
        self._free_at = 0.0  # when the line is free again, in the loop's time
        self._thread = threading.Thread(target=self._loop.run_forever, name="slow-proxy", daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = server.result(_LIMIT)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())

    def hold(self) -> None:
        """Pass no answer on until `go`."""
        self._loop.call_soon_threadsafe(self._go.clear)

    def go(self) -> None:
        self._loop.call_soon_threadsafe(self._go.set)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_LIMIT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIMIT)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [answer]
        try:
            server, request = await asyncio.open_connection(*self._upstream)
            writers.append(request)
            up, down = map(asyncio.ensure_future, self._pumps(client, request, server, answer))
            try:
                await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for writer in writers:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _pumps(
        self,
        client: asyncio.StreamReader,
        request: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
    ) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        """What hands requests on, and what hands answers back; when one ends, so does the connection."""
        return self._requests(client, request), self._answers(server, answer)

    async def _requests(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(_PIECE):
            await asyncio.sleep(self.latency)
            target.write(data)
            await target.drain()

    async def _answers(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(_PIECE):
            await self._turn(len(data))
            breaks = self.breaks is not None and self.breaks_times > 0
            if breaks and self.breaks is not None:
                self.breaks_times -= 1
                data = data[: int(self.breaks * len(data))]
            self.passed += len(data)
            target.write(data)
            await target.drain()
            if breaks:
                return

    async def _turn(self, nbytes: int) -> None:
        """Wait until the line may carry so many bytes of an answer."""
        await self._go.wait()
        if self.rate is not None:
            self._free_at = max(self._free_at, self._loop.time()) + nbytes / self.rate
            await asyncio.sleep(self._free_at - self._loop.time())
