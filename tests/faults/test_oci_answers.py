"""Answers of registries and token servers that are no answers: Floe's errors, and little memory."""

from __future__ import annotations

import contextlib
import gzip
import json
from http.server import BaseHTTPRequestHandler

import pytest
from support.loopback import Loopback
from support.memory import at_most

from floe.ingest.oci import registry as registry_module
from floe.ingest.oci import transport
from floe.ingest.oci.media import OCI_LAYER, Descriptor
from floe.ingest.oci.opening import open_source, open_target
from floe.store.errors import AccessDeniedError, FloeError, NotFoundError, ThrottledError, UnavailableError

MIB = 1 << 20
BOMB = gzip.compress(bytes(100 * MIB), 9)
TOO_LONG = f"http://{'a' * 70}.example/"  # a name's part has 63 letters at most
NO_ADDRESSES = ["http://[", "http://[x]/", TOO_LONG]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transport, "_BACKOFF", 0.001)
    monkeypatch.setattr(registry_module, "_BACKOFF", 0.001)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


class Answers(Loopback):
    """Answers `answer` to what it is asked, and `token` to who asks /token; without the latter it asks for none.

    Each is a status, headers and a body, which Content-Length counts unless the headers say how it comes. `connections`
    counts those that were made, `paths` has what was asked.
    """

    def __init__(self, answer, token=None):
        super().__init__(_Handler)
        self.answer, self.token = answer, token
        self.connections, self.paths = 0, []
        self.name = f"127.0.0.1:{self.port}/a/b:c"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_GET(self):
        server = self.server
        server.paths.append(self.path)
        if self.path.startswith("/token"):
            self._send(*server.token)
        elif server.token is not None and "Authorization" not in self.headers:
            realm = f'Bearer realm="http://127.0.0.1:{server.port}/token"'
            self._send(401, {"WWW-Authenticate": realm}, b"")
        else:
            self._send(*server.answer)

    def do_POST(self):
        self.do_GET()

    def _send(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or "Transfer-Encoding" in headers


def opened(server):
    return contextlib.closing(open_source(server.name, plain_http=True))


def ask(server):
    with opened(server) as source:
        return source.manifest()


def test_a_token_server_s_connection_is_used_again():
    token = json.dumps({"token": "t", "expires_in": 1e-9}).encode()
    with Answers((200, {"Content-Encoding": "identity"}, token)) as tokens:
        realm = f'Bearer realm="http://127.0.0.1:{tokens.port}/"'
        with Answers((401, {"WWW-Authenticate": realm}, b"")) as server, opened(server) as source:
            for _ in range(3):
                with pytest.raises(AccessDeniedError):
                    source.manifest()
    assert len(tokens.paths) >= 3
    assert tokens.connections == 1


def test_a_connection_that_redirects_is_used_again():
    with Answers((302, {"Location": "/v2/x"}, b"See there.")) as server:
        with pytest.raises(UnavailableError, match="redirects more than"):
            ask(server)
        assert len(server.paths) >= 10
        assert server.connections == 1


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Encoding": "gzip"}, BOMB, "compressed its answer"),
        ({"Content-Encoding": "gzip, gzip"}, gzip.compress(BOMB), "compressed its answer"),
        ({}, b" " * (32 * MIB), "more than 1048576 bytes"),
        ({}, b"[" * 100_000, "without a token"),
    ],
    ids=["gzip", "gzip twice", "long", "deep"],
)
def test_what_is_no_token(headers, body, message):
    with (
        Answers((200, {}, b""), (200, headers, body)) as server,
        at_most(16 * MIB),
        pytest.raises(AccessDeniedError, match=message),
    ):
        ask(server)


def test_a_token_that_breaks_off():
    with (
        Answers((200, {}, b""), (200, {"Transfer-Encoding": "chunked"}, b"5\r\nhal")) as server,
        pytest.raises(UnavailableError, match=r"token server .* cannot be reached"),
    ):
        ask(server)


@pytest.mark.parametrize("size", [b"-1", b"-5"])
@pytest.mark.parametrize("by", ["token", "manifest"])
def test_chunks_of_negative_size(by, size):
    chunked = (200, {"Transfer-Encoding": "chunked"}, size + b"\r\n" + bytes(32 * MIB))
    with (
        Answers(chunked, chunked if by == "token" else None) as server,
        at_most(16 * MIB),
        pytest.raises(UnavailableError),
    ):
        ask(server)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((404, {}, b"[" * 8000), NotFoundError),
        ((404, {"Content-Encoding": "gzip"}, BOMB), NotFoundError),
        ((429, {"Retry-After": "\xb2"}, b""), ThrottledError),
        ((302, {"Location": "/v2/x", "Content-Encoding": "gzip"}, BOMB), UnavailableError),
        *[((302, {"Location": address}, b""), UnavailableError) for address in NO_ADDRESSES],
        *[((401, {"WWW-Authenticate": f'Bearer realm="{it}"'}, b""), UnavailableError) for it in NO_ADDRESSES],
        ((401, {"WWW-Authenticate": f"Bearer {'a' * 60_000}"}, b""), AccessDeniedError),
    ],
    ids=lambda value: None if isinstance(value, type) else f"{value[0]} {str(value[1])[:60]}",
)
def test_a_registry_s_answers(answer, error):
    with Answers(answer) as server, at_most(16 * MIB), pytest.raises(error):
        ask(server)


@pytest.mark.parametrize("token", [(302, {"Location": "/x", "Content-Encoding": "gzip"}, BOMB), (400, {}, BOMB)])
def test_a_token_server_that_answers_otherwise(token):
    with (
        Answers((200, {}, b""), token) as server,
        at_most(16 * MIB),
        pytest.raises(AccessDeniedError, match=f"answered {token[0]}"),
    ):
        ask(server)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_upload_that_is_sent_nowhere(address):
    layer = Descriptor(OCI_LAYER, "sha256:" + "ab" * 32, 3)
    with (
        Answers((202, {"Location": address}, b"")) as server,
        contextlib.closing(open_target(server.name, plain_http=True)) as target,
        pytest.raises(FloeError),
    ):
        target.push_blob(layer, lambda: [b"abc"])
