"""A private docker-registry on a loopback port, and a front that stands before it and misbehaves on request.

`Registry` starts Debian's docker-registry with its own storage and reads the requests it answered from its access log.
`Front` is a small proxy, with TLS if asked to: it wants Basic passwords, or Bearer tokens that its own token server gives
out, redirects blobs to another port, breaks downloads, and spoils bytes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import ssl
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from support.loopback import Loopback

USER, PASSWORD = "floe", "secret"
# bcrypt of PASSWORD, as `htpasswd -B` writes it.
HTPASSWD = "floe:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
_REQUEST = re.compile(r'"(GET|HEAD|PUT|POST|PATCH|DELETE) (\S+) HTTP/[0-9.]+" (\d+)')
_SIZES = re.compile(r'"GET (\S+) HTTP/[0-9.]+" 20[06] (\d+)')
_START = 20.0  # seconds


class Registry:
    """docker-registry with log and port of its own. `host` is what image names begin with.

    `tls` is a certificate and its key; `storage` is another registry's, to show the same images.
    `notify`: the address and the secret of who is told of pushes and deletions.
    """

    def __init__(
        self,
        directory: Path,
        *,
        htpasswd: bool = False,
        tls: tuple[Path, Path] | None = None,
        storage: Path | None = None,
        notify: tuple[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.storage = storage or directory / "storage"
        auth = ""
        if htpasswd:
            (directory / "htpasswd").write_text(HTPASSWD)
            auth = f"auth:\n  htpasswd:\n    realm: floe\n    path: {directory / 'htpasswd'}\n"
        config = directory / "config.yml"
        config.write_text(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: false\n  level: info\n"
            f"storage:\n  filesystem:\n    rootdirectory: {self.storage}\n  delete:\n    enabled: true\n"
            f"http:\n  addr: 127.0.0.1:0\n  secret: {uuid.uuid4().hex}\n"
            + (f"  tls:\n    certificate: {tls[0]}\n    key: {tls[1]}\n" if tls else "")
            + auth
            + (
                "notifications:\n  endpoints:\n"
                f"    - name: floe\n      url: {notify[0]}\n      timeout: 10s\n      threshold: 5\n      backoff: 100ms\n"
                f"      headers:\n        Authorization: [Bearer {notify[1]}]\n"
                if notify
                else ""
            )
        )
        self._scheme = "https" if tls else "http"
        self._trust = ssl.create_default_context() if tls else None
        if self._trust:
            self._trust.check_hostname = False
            self._trust.verify_mode = ssl.CERT_NONE  # for the mark in its own log
        self._log = directory / "registry.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            self.port = self._wait()
        except BaseException:
            self.stop()
            raise
        self.host = f"127.0.0.1:{self.port}"

    def _wait(self) -> int:
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(rb"listening on 127\.0\.0\.1:(\d+)", self._log.read_bytes())
            if found:
                return int(found.group(1))
            time.sleep(0.02)
        raise RuntimeError(f"docker-registry did not start: {self._log.read_text(errors='replace')[-500:]}")

    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path, status) of all requests answered so far."""
        mark = uuid.uuid4().hex
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{self._scheme}://{self.host}/v2/?mark={mark}", context=self._trust).close()
        deadline = time.monotonic() + 5
        while mark not in (text := self._log.read_text(errors="replace")):
            if time.monotonic() > deadline:
                raise RuntimeError("docker-registry writes no access log")
            time.sleep(0.01)
        return [(m, path, int(code)) for m, path, code in _REQUEST.findall(text) if "mark=" not in path]

    def blob_requests(self) -> list[str]:
        """The digests of blobs that were downloaded."""
        return [
            path.rpartition("/")[2] for method, path, _ in self.requests() if method == "GET" and "/blobs/sha" in path
        ]

    def blob_bytes(self) -> int:
        """Bytes of blobs and ranges of blobs that were downloaded."""
        return self.downloads()["bytes"]["blob"]

    def downloads(self) -> dict[str, dict[str, int]]:
        """`requests` and `bytes` of blobs, or ranges of them, and of manifests that were downloaded."""
        self.requests()  # the log holds what was answered before now
        found = {"requests": {"blob": 0, "manifest": 0}, "bytes": {"blob": 0, "manifest": 0}}
        for path, size in _SIZES.findall(self._log.read_text(errors="replace")):
            for content, part in (("blob", "/blobs/sha"), ("manifest", "/manifests/")):
                if part in path:
                    found["requests"][content] += 1
                    found["bytes"][content] += int(size)
        return found

    def stop(self) -> None:
        """End the registry."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def push(self, source: str, name: str, *, timeout: float = 120) -> str:
        """Copy `source` (`oci:DIR:TAG`) to `name` (`app:1`) with skopeo; returns the full name."""
        target = f"{self.host}/{name}"
        command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "--preserve-digests", "-q"]
        subprocess.run([*command, source, f"docker://{target}"], check=True, timeout=timeout)
        return target


@contextlib.contextmanager
def running_registry(directory: Path, *, htpasswd: bool = False) -> Iterator[Registry]:
    """A Registry for the length of a with block."""
    registry = Registry(directory, htpasswd=htpasswd)
    try:
        yield registry
    finally:
        registry.stop()


class Front(Loopback):
    """A proxy before `upstream` (a Registry).

    `basic`: requests need one of `logins` (user: password); other passwords are answered `ended`. `bearer`: they need a
    token from `/token` (its requests are in `tokens`), which wants one of `logins`, or an identity token of `identities`,
    unless `anonymous`. A token says that it lasts `lifetime` seconds; it is refused after `uses` requests. `rotate`: an
    identity token is good for one. `redirect`: blobs are answered by a redirect to this other Front, as object storage
    would be. `breaks`: so many blob answers are cut short, each after `cut` bytes; `expire`: all tokens end with a break.
    `ranges`: whether Range is honoured. `spoil`: blobs have a byte flipped. `fail`: so many requests are answered 503;
    `fails` and `loses`: so many of a method are answered 503, before or after they were done. `status`: all are answered so. `api`: the API's root, if not /v2. `tls`: a server's context; `name`: the `HOST[:PORT]`
    it is known by. `seen` holds (method, path, headers), `answered` the statuses.
    """

    def __init__(self, upstream: Registry, **options: object) -> None:
        super().__init__(_Handler)
        self.upstream = upstream
        self.bearer = bool(options.pop("bearer", False))
        self.anonymous = bool(options.pop("anonymous", False))
        self.redirect: Front | None = options.pop("redirect", None)
        self.breaks = int(options.pop("breaks", 0))
        self.cut = int(options.pop("cut", 1000))
        self.ranges = bool(options.pop("ranges", True))
        self.spoil = bool(options.pop("spoil", False))
        self.fail = int(options.pop("fail", 0))
        self.fails: dict[str, int] = options.pop("fails", {})
        self.loses: dict[str, int] = options.pop("loses", {})
        self.status = int(options.pop("status", 0))
        self.basic = bool(options.pop("basic", False))
        self.logins: dict[str, str] = dict(options.pop("logins", {USER: PASSWORD}))
        self.identities = {"refresh-me"}
        self.rotate = bool(options.pop("rotate", False))
        self.lifetime = options.pop("lifetime", None)
        self.uses = options.pop("uses", None)
        self.expire = bool(options.pop("expire", False))
        self.ended = int(options.pop("ended", 401))
        self.api = str(options.pop("api", "/v2"))
        tls = options.pop("tls", None)
        name = options.pop("name", None)
        assert not options
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.answered: list[int] = []
        self.tokens: list[dict[str, list[str]]] = []
        self.valid: set[str] = set()
        self.used: dict[str, int] = {}  # requests by token
        self.host = name or f"127.0.0.1:{self.port}"
        self.address = f"{'https' if tls else 'http'}://{self.host}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # what is no HTTP gets an answer in HTTP, as from other servers
    server: Front

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        front = self.server
        front.seen.append((self.command, self.path, {k: ", ".join(self.headers.get_all(k)) for k in self.headers}))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        if self.path.startswith("/token"):
            self._token(body)
            return
        if front.fail > 0:
            front.fail -= 1
            self._answer(503, {}, b"")
            return
        if front.fails.get(self.command, 0) > 0:
            front.fails[self.command] -= 1
            self._answer(503, {}, b"")
            return
        if front.status:
            self._answer(front.status, {}, b"{}")
            return
        if not self.path.startswith(f"{front.api}/"):
            self._answer(404, {}, b"{}")
            return
        self.path = "/v2" + self.path[len(front.api) :]
        if front.basic and not self._logged_in():
            status = front.ended if "Authorization" in self.headers else 401
            self._answer(status, {"WWW-Authenticate": f'Basic realm="{front.address}/"'}, b"{}")
            return
        if front.bearer and not self._let_in():
            repository = re.sub(r"^/v2/|/(manifests|blobs)/.*", "", self.path)
            realm = f'Bearer realm="{front.address}/token",service="floe test",scope="repository:{repository}:pull"'
            self._answer(401, {"WWW-Authenticate": realm}, b"{}")
            return
        is_blob = self.command == "GET" and "/blobs/sha256:" in self.path
        if is_blob and front.redirect is not None:
            self._answer(307, {"Location": f"{front.redirect.address}{self.path}"}, b"")
            return
        self._forward(body, is_blob=is_blob)

    do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _logged_in(self) -> bool:
        sent = self.headers.get("Authorization", "").removeprefix("Basic ")
        user, _, password = base64.b64decode(sent).decode().partition(":") if sent else ("", "", "")
        return bool(user) and self.server.logins.get(user) == password

    def _let_in(self) -> bool:
        front = self.server
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        front.used[token] = front.used.get(token, 0) + 1
        return token in front.valid and (front.uses is None or front.used[token] <= front.uses)

    def _token(self, body: bytes | None) -> None:
        front = self.server
        query = parse_qs(body.decode() if body else urlsplit(self.path).query)
        front.tokens.append(query)
        identity = query.get("refresh_token", [""])[0] if self.command == "POST" else ""
        known = identity in front.identities
        anonymous = front.anonymous and "Authorization" not in self.headers
        if not known and not anonymous and not self._logged_in():
            self._answer(401, {}, b'{"errors":[{"message":"who are you"}]}')
            return
        token = uuid.uuid4().hex
        front.valid.add(token)
        answer: dict[str, object] = {"access_token" if known else "token": token}
        if known and front.rotate:
            front.identities = {uuid.uuid4().hex}
            answer["refresh_token"] = next(iter(front.identities))
        if front.lifetime is not None:
            answer["expires_in"] = front.lifetime
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _forward(self, body: bytes | None, *, is_blob: bool) -> None:
        front = self.server
        dropped = {"host", "authorization", *(() if front.ranges else ("range",))}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        upstream = http.client.HTTPConnection(front.upstream.host, timeout=30)
        try:
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            try:
                data = response.read()
            except http.client.IncompleteRead as error:  # a 416 of docker-registry
                data = error.partial
            kept = {
                k: v.replace(f"http://{front.upstream.host}", front.address)
                for k, v in response.getheaders()
                if k.lower() not in ("transfer-encoding", "connection")
            }
        finally:
            upstream.close()
        if is_blob and front.spoil and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if is_blob and front.breaks > 0 and len(data) > front.cut:
            front.breaks -= 1
            if front.expire:
                front.valid.clear()
            self._answer(response.status, kept, data[: front.cut])
            self.close_connection = True
            return
        if front.loses.get(self.command, 0) > 0:
            front.loses[self.command] -= 1
            self._answer(503, {}, b"")
            return
        if response.status == 416:
            kept = {}
        self._answer(response.status, kept, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.server.answered.append(status)
        self.send_response(status)
        if not any(key.lower() == "content-length" for key in headers):
            headers = {**headers, "Content-Length": str(len(body))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
