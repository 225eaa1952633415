"""Where registries tell what was pushed and deleted: POST of an envelope (see events.py) with a shared secret, nothing else.

An envelope is answered 202 once its jobs are in the queue, and 503 when they could not be put there in time: the registry sends
it again, and what was put there after all is not put twice. An event that no job can be made of is logged, and is no reason to
refuse the others: a registry would send all of them again, for ever.
The secret is compared in constant time; nothing of a request is read before it is known. For TLS, put an ingress before it.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from floe.indexer.events import BODY_MAX, jobs_of
from floe.store.errors import AccessDeniedError, BadInputError, BusyError, DeadlineError, FloeError, UnavailableError
from floe.store.imagepolicy import ImageRule, rule_for
from floe.store.index.jobs import INDEX, Queue
from floe.store.places import Head, Server

_log = logging.getLogger(__name__)
_SILENCE = 10.0  # seconds without a byte, after which a connection is given up; see places.py for all of it
_PUT_SECONDS = 3.0  # for the queue to take an envelope's jobs; the registry waits meanwhile
_PUTTING = 4  # envelopes on their way to the queue at a time
_SECRET_BYTES = 16  # at least; `openssl rand -hex 32` makes one
_REFUSED_EVERY = 60.0  # seconds between two lines about refused requests
_REASON_MAX = 300  # characters
_CALLED_OTHERWISE = "; where nodes call the registry otherwise, give --webhook-registry HOST[:PORT]"


def read_secret(path: Path) -> bytes:
    """The secret in a file, without white space around it. AccessDeniedError, BadInputError: none, or too short."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        hint = "let this user read it, or give another file"
        if isinstance(error, FileNotFoundError):
            hint = f"make one, and give its line to the registries: openssl rand -hex 32 > {path}"
        raise AccessDeniedError(f"cannot read the webhook's secret in {path}: {error.strerror}", hint=hint) from error
    if len(secret) < _SECRET_BYTES or not secret.isascii() or b"\n" in secret:
        raise BadInputError(
            f"{path} holds no secret of at least {_SECRET_BYTES} ASCII characters on one line",
            hint=f"openssl rand -hex 32 > {path}",
        )
    return secret


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[::]:PORT` or `:PORT` (every address). BadInputError otherwise."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise BadInputError(f"{text!r} is no address to listen at", hint="use HOST:PORT, or :PORT for every address")
    return host, int(port)


class Webhook:
    """Serves until `close`; `address` is (host, port), with the port that was found for port 0.

    BusyError: the address is taken; AccessDeniedError: not allowed there.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret_file: Path,
        queue: Queue,
        *,
        registry: str | None = None,
        rules: tuple[ImageRule, ...] = (),
    ) -> None:
        read_secret(secret_file)  # now, not at the first request
        self._secret_file, self._queue, self._registry, self._rules = secret_file, queue, registry, rules
        self._told_refused = -_REFUSED_EVERY
        host, port = address
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            kind = type("_Server", (Server,), {"address_family": family})
            self._server = kind((host, port), _handler(self))
        except PermissionError as error:
            raise AccessDeniedError(f"cannot listen at {host}:{port}: {error.strerror}") from error
        except OSError as error:
            raise BusyError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
        self.address: tuple[str, int] = self._server.server_address[:2]
        self._putting = ThreadPoolExecutor(_PUTTING, thread_name_prefix="webhook-queue")
        self._thread = threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._putting.shutdown(wait=False, cancel_futures=True)

    def allows(self, authorization: str) -> bool:
        """Whether a request with this header may speak. The file is read for each: the secret can be rotated."""
        try:
            secret = read_secret(self._secret_file)
        except FloeError as error:
            _log.error("%s", error)
            return False
        given = authorization.encode("latin-1", "replace")
        return hmac.compare_digest(given, b"Bearer " + secret)

    def receive(self, body: bytes) -> int:
        """Put what an envelope asks for into the queue; how many jobs are new there. ValueError: none; UnavailableError."""
        skipped: list[str] = []
        found = jobs_of(body, time.time(), self._registry, skipped.append)
        if skipped:
            hint = "" if self._registry else _CALLED_OTHERWISE
            said = "%d events of a notification are passed over, the first since %s%s"
            _log.warning(said, len(skipped), skipped[0][:_REASON_MAX], hint)
        jobs = [job for job in found if job.action != INDEX or rule_for(job.ref, self._rules) is not None]
        if not jobs:
            return 0
        putting = self._putting.submit(self._queue.put_all, jobs)
        try:
            return putting.result(_PUT_SECONDS)
        except LateError as error:
            putting.cancel()
            raise DeadlineError(
                f"{len(jobs)} jobs could not be put into the queue within {_PUT_SECONDS:g} s"
            ) from error

    def refused(self, why: str, where: str) -> None:
        """Say that somebody was refused, now and then."""
        if time.monotonic() - self._told_refused >= _REFUSED_EVERY:
            self._told_refused = time.monotonic()
            _log.warning("a request from %s to the webhook was refused: %s", where, why)


def _handler(webhook: Webhook) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SILENCE
        server: Server

        def setup(self) -> None:
            super().setup()
            self.rfile = Head(self.rfile)  # type: ignore[assignment]

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/healthz" else 404)

        def do_POST(self) -> None:
            if not webhook.allows(self.headers.get("Authorization", "")):
                webhook.refused("the Authorization header is not `Bearer` and the secret", self.client_address[0])
                self._answer(401)
                return
            self.server.is_known(self.connection)
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
                self._answer(411)
                return
            if len(length) > len(str(BODY_MAX)) or int(length) > BODY_MAX:
                self._answer(413)
                return
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                return  # cut off
            self.server.is_read(self.connection)
            self._receive(body)

        def _receive(self, body: bytes) -> None:
            try:
                new = webhook.receive(body)
            except ValueError as error:
                webhook.refused(f"no envelope of notifications: {error}", self.client_address[0])
                self._answer(400)
            except UnavailableError as error:
                _log.warning("%s; the registry is to send its notification again", error)
                self._answer(503)
            else:
                _log.debug("%d jobs from %s", new, self.client_address[0])
                self._answer(202)

        def _answer(self, status: int) -> None:
            self.close_connection = True
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

        def version_string(self) -> str:
            return "floe"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            _log.debug(format, *args)

    return Handler
