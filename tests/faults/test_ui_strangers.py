"""`floe ui` before strangers: who has no token keeps nobody out, fills no memory, and holds no connection for long."""

import contextlib
import socket
import threading
import urllib.request

import pytest
from support.floe_node import wait_until

from floe.cli import ui_server
from floe.cli.ui_server import PageServer
from floe.store import places

TOKEN = "t" * 32


class Shown:
    def sample(self):
        return {"mounts": []}


@pytest.fixture
def page():
    server = PageServer("127.0.0.1", 0, Shown(), lambda value: value, token=TOKEN)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.close()
    thread.join()


def connect(page, stack, text=b""):
    made = stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", page.port), timeout=60)))
    made.sendall(text)
    return made


def ask(page):
    request = urllib.request.Request(
        f"http://127.0.0.1:{page.port}/state.json", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nX: " + b"a" * 4000])
def test_a_crowd_of_strangers_keeps_nobody_out(page, monkeypatch, said):
    monkeypatch.setattr(places, "_SECONDS", 600.0)
    monkeypatch.setattr(ui_server._Handler, "timeout", 600.0)
    with contextlib.ExitStack() as stack:
        crowd = [connect(page, stack, said) for _ in range(places._AT_ONCE + 8)]
        assert ask(page) == b'{"mounts":[]}'
        crowd[0].settimeout(60)
        assert b" 200 " not in crowd[0].recv(1000)  # the oldest made room
        assert len(page._server._taken) <= places._AT_ONCE


def test_who_trickles_is_cut_off(page, monkeypatch):
    monkeypatch.setattr(places, "_SECONDS", 0.3)
    with contextlib.ExitStack() as stack:
        one = connect(page, stack, b"GET / HTTP/1.1\r\n")
        assert one.recv(1000) == b""
        wait_until(lambda: not page._server._taken)
    assert ask(page) == b'{"mounts":[]}'


def test_of_a_head_no_more_is_read_than_is_of_use(page):
    with contextlib.ExitStack() as stack:
        line = b"X: " + b"a" * 8000 + b"\r\n"
        one = connect(
            page, stack, b"GET /state.json HTTP/1.1\r\n" + line * 3 + b"Authorization: Bearer " + TOKEN.encode()
        )
        with contextlib.suppress(ConnectionResetError):  # what it sent was not read
            assert b" 200 " not in one.recv(1000)
