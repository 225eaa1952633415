"""The connections of a server that strangers may reach: so many at a time, each for so long, and no stranger keeps out who is known."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

_log = logging.getLogger(__name__)
_AT_ONCE = 64  # connections; more wait in the kernel's queue
_SECONDS = 10.0  # for a request, from its connection to its last byte
_HEAD_MAX = 16 << 10  # bytes of a request's line and headers


@dataclass
class _Place:
    timer: threading.Timer
    known: bool = False


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection. When all places are taken, the newest takes that of whoever has said nothing of use for longest."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._free = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()  # guards _taken, which is in order of arrival
        self._taken: dict[socket.socket, _Place] = {}
        super().__init__(*args)

    def is_known(self, connection: socket.socket) -> None:
        """It may speak: its place is no other's any more."""
        with self._lock:
            self._taken[connection].known = True

    def is_read(self, connection: socket.socket) -> None:
        """All of its request is here: what it waits for now is us."""
        with self._lock:
            self._taken[connection].timer.cancel()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Wait for a place, then answer in a thread."""
        if not self._free.acquire(blocking=False):
            self._shed()
            self._free.acquire()
        # Whoever sends a byte now and then does not hold a place for longer.
        timer = threading.Timer(_SECONDS, _cut, (request,))
        timer.daemon = True
        with self._lock:
            self._taken[request] = _Place(timer)
        try:
            timer.start()
            super().process_request(request, client_address)
        except BaseException:
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer; the place is free afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        """A connection that broke is nobody's problem here."""
        _log.debug("a request from %s ended early", client_address, exc_info=True)

    def _shed(self) -> None:
        with self._lock:
            for request, place in self._taken.items():
                if not place.known:
                    place.known = True  # nor is it shed twice
                    _cut(request)
                    return

    def _leave(self, request: socket.socket) -> None:
        with self._lock:
            self._taken.pop(request).timer.cancel()
        self._free.release()


class Head:
    """Of a request's line and headers no more than _HEAD_MAX bytes are read: strangers fill no memory. A body is as `file` has it."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = _HEAD_MAX

    def readline(self, size: int = -1) -> bytes:
        """A line, or what of it is allowed; b"" then."""
        line = self._file.readline(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(line)
        return line

    def read(self, size: int = -1) -> bytes:
        """What comes after the head."""
        return self._file.read(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it ended by itself
        request.shutdown(socket.SHUT_RDWR)
