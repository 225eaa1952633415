"""The line to the S3 server, with faults: a SlowProxy that also refuses, breaks off, cuts short, throttles and flips bits.

Each fault is a probability for each request or answer, 0 for never, and may be changed at any time. Bits are flipped in
packs alone, and in a request for the same bytes once in a while at most: what differs twice in a row is damage at rest,
which is another matter.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from support.slow_proxy import SlowProxy

_PIECE = 64 << 10
_METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")
_ONCE = 60.0  # seconds in which the bits of one pack are flipped once
_BODY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    % len(_BODY)
) + _BODY


class Line(SlowProxy):
    """`faults` counts what was done, by kind. `refusing`: no connection is taken, and none is kept."""

    def __init__(self, upstream: tuple[str, int], seed: int) -> None:
        self.reset = self.truncate = self.throttle = self.flip = 0.0
        self.refusing = False
        self.faults: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._flipped: dict[bytes, float] = {}  # pack's path -> when
        super().__init__(upstream)

    def clear(self) -> None:
        """No faults from now on."""
        self.reset = self.truncate = self.throttle = self.flip = 0.0
        self.refusing = False
        self.latency, self.rate = 0.0, None
        self.go()

    def _pumps(
        self,
        client: asyncio.StreamReader,
        request: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
    ) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        path = [b""]  # of the request under way
        return self._ask(client, request, answer, path), self._tell(server, answer, path)

    async def _ask(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        answer: asyncio.StreamWriter,
        path: list[bytes],
    ) -> None:
        while data := await source.read(_PIECE):
            if self.refusing:
                self.faults["refused"] += 1
                return
            if data.startswith(_METHODS):
                path[0] = data.split(b" ", 2)[1]
                if data.startswith((b"GET ", b"HEAD ")) and self._happens(self.throttle):
                    self.faults["throttled"] += 1
                    answer.write(_SLOW_DOWN if data.startswith(b"GET ") else _SLOW_DOWN.removesuffix(_BODY))
                    await self._finish(answer)
                    return
            await asyncio.sleep(self.latency)
            target.write(data)
            await target.drain()

    async def _tell(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, path: list[bytes]) -> None:
        while data := await source.read(_PIECE):
            await self._turn(len(data))
            if self._happens(self.reset):
                self.faults["reset"] += 1
                return
            if self._happens(self.truncate):
                self.faults["cut short"] += 1
                target.write(data[: len(data) // 2])
                await self._finish(target)
                return
            if self._happens(self.flip) and self._may_flip(data, path[0]):
                self.faults["bits flipped"] += 1
                position = len(data) - 1 - self._random.randrange(len(data) // 4)
                data = data[:position] + bytes([data[position] ^ 1 << self._random.randrange(8)]) + data[position + 1 :]
            self.passed += len(data)
            target.write(data)
            await target.drain()

    async def _finish(self, target: asyncio.StreamWriter) -> None:
        """An end in order, whatever there may be more."""
        await target.drain()
        if target.can_write_eof():
            target.write_eof()
        await asyncio.sleep(0.05)  # the caller resets the connection

    def _may_flip(self, data: bytes, path: bytes) -> bool:
        """Only content: a piece of a pack that is long enough for its last quarter to be no header."""
        now = time.monotonic()
        if b"/packs/" not in path or len(data) < 16 << 10 or now - self._flipped.get(path, -_ONCE) < _ONCE:
            return False
        self._flipped[path] = now
        return True

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability
