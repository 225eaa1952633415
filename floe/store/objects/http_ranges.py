"""Ranges of objects, read from the socket into the caller's memory.

obstore puts a range together in memory of its own, which is copied once more from there: for each gigabyte half a second of
processor time, most of it page faults (docs/adr/0010). Here only an answer that is exactly what was asked for counts. For anything
else there is a RangeError, and the caller asks through obstore, which knows refusals, credentials and retries.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from floe.store.errors import FloeError, RangeError

_log = logging.getLogger(__name__)

_CONNECT, _SILENCE = 5.0, 30.0  # seconds
_IDLE = 15.0  # seconds after which a connection is not used again: servers close theirs after 20 and more
_POOL = 64  # idle connections
_REST, _REST_MOST = 1.0, 60.0  # seconds without requests after one that failed, doubled with each that follows


class Location(NamedTuple):
    """Where an object is: its URL, which may hold a signature and is never shown, and the headers that open it."""

    url: str
    headers: Mapping[str, str]


class HTTPRange:
    """Bytes [start, start + length) of an object, in order, asked for by the first read. For one thread, but `abort` for any.

    After a RangeError `refused` may have an HTTP status, 416 also where the object ends within the range; `proxied`: a proxy
    is to be asked instead.
    """

    def __init__(self, ranges: HTTPRanges, key: str, start: int, length: int) -> None:
        self._ranges = ranges
        self._key = key
        self._start = start
        self._length = length
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._lock = threading.Lock()  # so that what was given back is not shut down: another request has it
        self.aborted = self.proxied = False
        self.refused: int | None = None

    def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` with what comes next. RangeError when that cannot be had this way."""
        response = self._response
        if response is None:
            self._ranges.ask(self, self._key)
            response = self._response
        assert response is not None
        try:
            count = response.readinto(buffer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RangeError(f"the answer broke off: {type(error).__name__}") from error
        if count != len(buffer):
            raise RangeError("the answer broke off")

    def send(self, connection: http.client.HTTPConnection, target: str, headers: Mapping[str, str]) -> None:
        """Ask over `connection`, which connects if it has not yet, and read the answer's headers."""
        self._connection = connection
        fresh = connection.sock is None
        if fresh:
            connection.connect()
            connection.sock.settimeout(_SILENCE)
        if self.aborted:
            raise RangeError("nobody wants it any more")
        asked = f"bytes={self._start}-{self._start + self._length - 1}"
        connection.request("GET", target, headers={**headers, "Range": asked})
        response = connection.getresponse()
        if response.status != http.client.PARTIAL_CONTENT:
            self.refused = response.status
            raise RangeError(f"the server answered {response.status}")
        described = response.getheader("Content-Range") or ""
        if response.length != self._length or not described.startswith(f"{asked.replace('=', ' ')}/"):
            size = described.rpartition("/")[2]
            if size.isdecimal() and int(size) < self._start + self._length:
                self.refused = http.client.REQUESTED_RANGE_NOT_SATISFIABLE  # as is said of what begins past the end
            raise RangeError("the server answered another range")
        self._response = response

    def abort(self) -> None:
        """Nobody wants the rest: whoever is waiting for it is told so."""
        with self._lock:
            self.aborted = True
            connected = None if self._connection is None else self._connection.sock
            if connected is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's, which takes its state from under the thread that reads.
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def close(self) -> None:
        """Keep the connection when the answer was read to its end."""
        response = self._response
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        if response is not None and response.isclosed() and not response.will_close and not self.aborted:
            self._ranges.keep(connection)
        else:
            connection.close()


class HTTPRanges:
    """Ranges of the objects that `locate` finds, which raises a FloeError where there is no such way. Thread-safe.

    `ca`: PEM certificates, trusted besides the system's. Where the environment names a proxy for a server it is left to obstore.
    """

    def __init__(self, locate: Callable[[str], Location], ca: Path | None) -> None:
        self._locate = locate
        self._ca = ca
        self._context: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str], deque[tuple[float, http.client.HTTPConnection]]] = {}
        self._proxied: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._rest_until = 0.0
        self._rest = _REST

    def open(self, key: str, start: int, length: int) -> HTTPRange:
        """Bytes [start, start + length) of an object; nothing is asked yet. RangeError: not this way now."""
        if time.monotonic() < self._rest_until:
            raise RangeError("requests this way failed a moment ago")
        return HTTPRange(self, key, start, length)

    def ask(self, wanted: HTTPRange, key: str) -> None:
        """Send the request of `wanted`. RangeError, and a rest, when the answer is another than what was asked for."""
        try:
            self._ask(wanted, self._locate(key))
        except (FloeError, OSError, http.client.HTTPException, ValueError) as error:
            if not wanted.aborted:
                self._rest_until = time.monotonic() + self._rest
                self._rest = min(2 * self._rest, _REST_MOST)
            _log.debug("%s cannot be read directly: %s", key, type(error).__name__)
            # Without the error's text: it may quote a signed URL.
            raise RangeError(f"{key} cannot be read directly: {type(error).__name__}") from None
        self._rest = _REST

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """A connection that may be used again."""
        scheme = "https" if isinstance(connection, http.client.HTTPSConnection) else "http"
        with self._lock:
            idle = self._idle.setdefault((scheme, f"{connection.host}:{connection.port}"), deque())
            idle.append((time.monotonic(), connection))
            surplus = idle.popleft()[1] if len(idle) > _POOL else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for _, connection in connections:
                connection.close()

    def _ask(self, wanted: HTTPRange, location: Location) -> None:
        parts = urlsplit(location.url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        wanted.proxied = self._is_proxied(parts.scheme, host)
        if wanted.proxied:
            raise RangeError("there is a proxy")
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Host": parts.netloc, **location.headers}
        kept = self._kept(parts.scheme, f"{host}:{port}")
        if kept is not None:
            try:
                wanted.send(kept, target, headers)
            except (ConnectionError, http.client.BadStatusLine):
                kept.close()  # the server has closed it in the meantime, or closes them all
            else:
                return
        wanted.send(self._new(parts.scheme, host, port), target, headers)

    def _kept(self, scheme: str, address: str) -> http.client.HTTPConnection | None:
        """A connection that was used before and not long ago."""
        old = []
        found = None
        with self._lock:
            if self._pid != os.getpid():  # forked: a parent's connections bring its answers
                self._idle, self._pid = {}, os.getpid()
            idle = self._idle.get((scheme, address))
            while idle and found is None:
                since, connection = idle.pop()
                if time.monotonic() - since < _IDLE:
                    found = connection
                else:
                    old.append(connection)
        for connection in old:
            connection.close()
        return found

    def _new(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        if scheme == "https":
            if self._context is None:
                self._context = ssl.create_default_context()
                if self._ca is not None:
                    self._context.load_verify_locations(self._ca)
            return http.client.HTTPSConnection(host, port, timeout=_CONNECT, context=self._context)
        return http.client.HTTPConnection(host, port, timeout=_CONNECT)

    def _is_proxied(self, scheme: str, host: str) -> bool:
        found = self._proxied.get(f"{scheme}://{host}")
        if found is None:
            proxies = getproxies()
            found = bool(proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host)
            self._proxied[f"{scheme}://{host}"] = found
        return found
