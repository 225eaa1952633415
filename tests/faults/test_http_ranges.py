"""Ranges read straight from a server's socket: whatever it answers but exactly the range, the caller is told to go another way."""

import contextlib
import logging
import socket
import threading

import pytest

from floe.store.errors import RangeError
from floe.store.objects.http_ranges import HTTPRanges, Location

DATA = bytes(range(256)) * 1024
LIMIT = 10.0  # seconds


class Server:
    """Answers each request on 127.0.0.1 with what `answer(start, stop)` gives; None: closes. Counts connections."""

    def __init__(self, answer):
        self.answer = answer
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, client.makefile("rb") as lines, contextlib.suppress(OSError):
            while lines.readline():
                asked = (0, 0)
                while (line := lines.readline().strip()) != b"":
                    if line.lower().startswith(b"range: bytes="):
                        start, _, stop = line.split(b"=")[1].partition(b"-")
                        asked = (int(start), int(stop) + 1)
                answer = self.answer(*asked)
                if answer is None:
                    return
                client.sendall(answer)

    def close(self):
        self._socket.close()


def good(start, stop, *, body=None, status="206 Partial Content", described=None):
    body = DATA[start:stop] if body is None else body
    described = described or f"bytes {start}-{stop - 1}/{len(DATA)}"
    head = f"HTTP/1.1 {status}\r\nContent-Length: {stop - start}\r\nContent-Range: {described}\r\n\r\n"
    return head.encode() + body


@pytest.fixture
def opened():
    """Makes a server that answers in a certain way, and what reads from it."""
    with contextlib.ExitStack() as stack:

        def make(answer):
            server = Server(answer)
            stack.callback(server.close)
            url = f"http://{server.address}/bucket/key?X-Amz-Signature=secret"
            ranges = HTTPRanges(lambda _key: Location(url, {}), None)
            stack.callback(ranges.close)
            return server, ranges

        yield make


def read(ranges, start=0, length=1000):
    found = ranges.open("key", start, length)
    memory = bytearray(length)
    try:
        found.readinto(memoryview(memory))
    finally:
        found.close()
    return bytes(memory)


def test_a_connection_serves_one_range_after_another(opened):
    server, ranges = opened(good)
    for start in (0, 5000, 77):
        assert read(ranges, start) == DATA[start : start + 1000]
    assert server.connections == 1


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(opened):
    answers = [good, good]
    server, ranges = opened(lambda start, stop: answers.pop(0)(start, stop) if answers else None)
    assert read(ranges) == DATA[:1000]
    answers[:] = [lambda *_: None, good]  # the kept connection ends without an answer
    assert read(ranges, 10) == DATA[10:1010]
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda start, stop: good(start, stop, status="200 OK"),
        lambda start, stop: good(start, stop, status="403 Forbidden"),
        lambda start, stop: good(start, stop, status="503 Slow Down"),
        lambda start, stop: good(start, stop, described="bytes 1-1000/99999"),
        lambda start, stop: good(start, stop - 1, described=f"bytes {start}-{stop - 1}/99999"),
        lambda *_: b"SSH-2.0-OpenSSH\r\n",
        lambda *_: None,
    ],
    ids=["whole", "refused", "throttled", "another range", "short", "not http", "closed"],
)
def test_another_answer_is_no_answer(opened, answer, caplog):
    caplog.set_level(logging.DEBUG)
    server, ranges = opened(answer)
    with pytest.raises(RangeError) as told:
        read(ranges)
    assert "secret" not in str(told.value) + caplog.text
    asked = server.connections
    with pytest.raises(RangeError):  # not again at once: the other way is slower, but every failure costs a request
        read(ranges)
    assert server.connections == asked


def test_an_answer_that_breaks_off_is_told(opened):
    _, ranges = opened(lambda start, stop: good(start, stop, body=DATA[:10] + b""))
    found = ranges.open("key", 0, 1000)
    ender = threading.Timer(0.2, found.abort)
    ender.start()
    with pytest.raises(RangeError):
        found.readinto(memoryview(bytearray(1000)))
    found.close()
    ender.join()


@pytest.mark.parametrize("sent", [b"", b"x" * 10], ids=["for the answer", "for its rest"])
def test_abort_ends_a_read_that_waits(opened, sent):
    waiting = threading.Event()
    answers = [lambda start, stop: good(start, stop, body=sent) if sent else b""]

    def stalls(start, stop):
        waiting.set()
        return answers.pop()(start, stop) if answers else good(start, stop)

    _, ranges = opened(stalls)
    found = ranges.open("key", 0, 1000)
    failed = threading.Event()

    def reader():
        with pytest.raises(RangeError):
            found.readinto(memoryview(bytearray(1000)))
        failed.set()

    thread = threading.Thread(target=reader)
    thread.start()
    assert waiting.wait(LIMIT)
    found.abort()
    assert failed.wait(LIMIT)
    thread.join()
    found.close()
    assert read(ranges) == DATA[:1000]  # at once: nothing has failed


def test_abort_of_what_was_read_to_its_end_ends_no_other_request(opened):
    server, ranges = opened(good)
    found = ranges.open("key", 0, 1000)
    found.readinto(memoryview(bytearray(1000)))
    found.close()
    found.abort()
    assert read(ranges) == DATA[:1000]
    assert server.connections == 1


def test_where_there_is_a_proxy_nothing_is_sent(opened, monkeypatch):
    server, ranges = opened(good)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")
    with pytest.raises(RangeError):
        read(ranges)
    assert server.connections == 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    _, ranges = opened(good)
    assert read(ranges) == DATA[:1000]
