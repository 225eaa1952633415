"""A proxy before a real S3 server that does by name what networks and servers do at their worst.

Requests go on as they came, signature and all: their Host is this proxy's, and nothing else looks at it. What is done to
which of them is said by `FaultProxy.fault`; a fault for HTTP answers is one of FAULTS.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from support import seaweed

from floe.store.objects import bucket, http_ranges, s3_client

_LIMIT = 10.0  # seconds for the proxy's own threads
_RANGE = re.compile(rb"range: *bytes=(\d+)-(\d+)", re.IGNORECASE)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_DESCRIBED = re.compile(rb"content-range: [^\r]*\r\n", re.IGNORECASE)
# What the server is made to say: status, reason, S3's code.
_SAID = {
    "http_500": (500, "InternalError"),
    "slow_down_503": (503, "SlowDown"),
    "clock_skew": (403, "RequestTimeTooSkewed"),
    "expired_token": (403, "ExpiredToken"),
    "vanished": (404, "NoSuchKey"),
}
_OTHERS = (
    "reset_before_answer",  # the request is not handed on
    "lost_answer",  # it is, and what was asked for is done
    "reset_mid_body",
    "stall_before_answer",
    "stall_mid_body",
    "closed_mid_body",  # in order, but before Content-Length
    "short_body",  # and Content-Length agrees
    "flipped_bit",
    "wrong_range",
    "whole_object",  # 200 for a range
)
FAULTS = (*_SAID, *_OTHERS)
LATE = "late_answer"  # right, but `seconds` late: no fault to those who wait


@dataclass
class Fault:
    """`name` for requests that match, `times` of them (None: all) until it is `over`; `hits` counts."""

    name: str
    method: str
    matches: str
    part: tuple[int, int] | None
    times: int | None
    seconds: float = 0.0
    hits: int = 0
    over: bool = False


@dataclass
class _Request:
    head: bytes
    body: bytes
    method: str
    target: str
    range: tuple[int, int] | None  # first and last byte


class FaultProxy:
    """Before `endpoint`, the URL of a server; `url` is where it listens, with TLS where `tls` says how."""

    def __init__(self, endpoint, tls=None):
        parts = urlsplit(endpoint)
        self._upstream = (parts.hostname, parts.port)
        self._tls = tls
        self._lock = threading.Lock()  # guards _faults, their hits, and _open
        self._faults = []
        self._open = set()
        self._closing = threading.Event()
        self._healed = threading.Event()
        self.garbles_tls = False
        self.requests = 0
        self._listener = None
        self._port = 0
        self.listen()
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._port}"

    def listen(self):
        """Accept connections; as from the beginning."""
        self._listener = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        self._port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def refuse(self):
        """Refuse connections from now on, and reset those that are there."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self._thread.join(_LIMIT)
        self.reset()

    def reset(self):
        """Reset all connections."""
        with self._lock:
            there = list(self._open)
        for connection in there:
            _reset(connection)

    def fault(self, name, *, method="GET", matches="", part=None, times=None, seconds=0.0):
        """From now on do `name` to requests of `method` ("*": any) whose target has `matches` in it.

        `part`: only to those whose range begins in [part[0], part[1]).
        """
        assert name in (*FAULTS, LATE), name
        made = Fault(name, method, matches, part, times, seconds)
        with self._lock:
            self._healed.clear()
            self._faults.append(made)
        return made

    def heal(self):
        """End all faults; what stalls goes on."""
        with self._lock:
            for fault in self._faults:
                fault.over = True
            self._faults.clear()
        self._healed.set()

    def close(self):
        self._closing.set()
        self.heal()
        self.refuse()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        try:
            if self.garbles_tls:
                connection.recv(1024)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x28")  # alert: handshake failure
                return
            if self._tls is not None:
                plain, connection = connection, self._tls.wrap_socket(connection, server_side=True)
                with self._lock:
                    self._open.discard(plain)
                    self._open.add(connection)
            with connection.makefile("rb") as lines:
                while (request := _read_request(lines, connection)) is not None:
                    if not self._answer(connection, request):
                        return
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _matching(self, request):
        with self._lock:
            self.requests += 1
            for fault in self._faults:
                if fault.method not in ("*", request.method) or fault.matches not in request.target:
                    continue
                if fault.part is not None and not (request.range and fault.part[0] <= request.range[0] < fault.part[1]):
                    continue
                if fault.times is not None and fault.hits >= fault.times:
                    continue
                fault.hits += 1
                return fault
        return None

    def _answer(self, connection, request):
        """Answer one request; whether the connection goes on."""
        fault = self._matching(request)
        name = "" if fault is None else fault.name
        if name in _SAID:
            connection.sendall(_error(*_SAID[name], with_body=request.method != "HEAD"))
            return True
        if name == "reset_before_answer":
            _reset(connection)
            return False
        if name == "stall_before_answer":
            self._stall(connection)
            return False
        if name == LATE:
            self._closing.wait(fault.seconds)
        head, body = self._ask(request)
        if name == "lost_answer":
            _reset(connection)
            return False
        if name == "flipped_bit" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        if name == "wrong_range":
            head, body = _described(head, b"bytes %d-%d/%d" % (1, len(body), len(body) + 1)), body[1:] + b"\0"
        elif name == "whole_object":
            body = bytes(request.range[0] if request.range else 0) + body
            head = _described(head, None).replace(b"206 Partial Content", b"200 OK", 1)
            head = _LENGTH.sub(b"Content-Length: %d" % len(body), head)
        half = body[: len(body) // 2]
        if name == "short_body":
            head, body = _LENGTH.sub(b"Content-Length: %d" % len(half), head), half
        elif name in ("reset_mid_body", "stall_mid_body", "closed_mid_body"):
            connection.sendall(head + half)
            if name == "reset_mid_body":
                _reset(connection)
            elif name == "stall_mid_body":
                self._stall(connection)
            return False
        connection.sendall(head + body)
        return True

    def _stall(self, connection):
        """Until all is healed, or the client is gone."""
        while not self._healed.wait(0.02) and not self._closing.is_set():
            with contextlib.suppress(BlockingIOError, ValueError):
                if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return
        _reset(connection)

    def _ask(self, request):
        with socket.create_connection(self._upstream, timeout=60) as upstream:
            upstream.sendall(request.head + request.body)
            answer = http.client.HTTPResponse(upstream, method=request.method)
            answer.begin()
            body = answer.read()
            status = f"HTTP/1.1 {answer.status} {answer.reason}\r\n".encode()
            dropped = {"connection", "transfer-encoding", "content-length"}
            kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in dropped]
            length = answer.getheader("Content-Length") if request.method == "HEAD" else None
            kept.append(("Content-Length", length if length is not None else str(len(body))))
            if answer.status in (204, 304):
                kept.pop()
            return status + b"".join(f"{n}: {v}\r\n".encode("latin-1") for n, v in kept) + b"\r\n", body


@contextlib.contextmanager
def impatient_proxy(monkeypatch, silence):
    """One before the shared SeaweedFS, whose credentials this process gets; what is silent for `silence` seconds is asked again.

    As in production but for the seconds.
    """
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    for module in (http_ranges, s3_client):
        monkeypatch.setattr(module, "_SILENCE", silence)
    monkeypatch.setitem(bucket._CLIENT, "read_timeout", timedelta(seconds=silence))
    with FaultProxy(seaweed.running().endpoint) as made:
        yield made


def _read_request(lines, connection):
    first = lines.readline()
    if not first:
        return None
    found = [first]
    while (line := lines.readline()) not in (b"\r\n", b""):
        found.append(line)
    length, expects, part = 0, False, None
    for line in found[1:]:
        if match := _LENGTH.match(line):
            length = int(match[1])
        elif match := _RANGE.match(line):
            part = (int(match[1]), int(match[2]))
        elif line.lower().startswith(b"expect: 100-continue"):
            expects = True
    if expects:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        found = [line for line in found if not line.lower().startswith(b"expect:")]
    body = lines.read(length)
    if len(body) < length:
        return None
    method, target = first.decode("latin-1").split()[:2]
    found.append(b"\r\n")
    return _Request(b"".join(found), body, method, target, part)


def _described(head, as_what):
    """An answer's head with another Content-Range, or None."""
    return _DESCRIBED.sub(b"" if as_what is None else b"Content-Range: " + as_what + b"\r\n", head)


def _error(status, code, *, with_body):
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Said by the proxy.</Message></Error>".encode()
    body = text if with_body else b""
    head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _reset(connection):
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.shutdown(connection, socket.SHUT_RD)
        connection.close()
