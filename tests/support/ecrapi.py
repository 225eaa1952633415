"""The part of Amazon ECR's API that gives out passwords, on loopback: GetAuthorizationToken."""

from __future__ import annotations

import base64
import json
import time
import uuid
from http.server import BaseHTTPRequestHandler

from support.loopback import Loopback


class EcrApi(Loopback):
    """Each answer's password becomes the only one in `logins`, for user AWS; it says that it lasts `lifetime` seconds.

    `refuse`: the error code that is answered instead. `asked` holds the Authorization headers.
    """

    def __init__(self, logins: dict[str, str], lifetime: float = 12 * 3600) -> None:
        super().__init__(_Handler)
        self.logins, self.lifetime = logins, lifetime
        self.refuse = ""
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EcrApi

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        api = self.server
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert self.headers["X-Amz-Target"].endswith(".GetAuthorizationToken")
        api.asked.append(self.headers["Authorization"])
        if api.refuse:
            self._answer(400, {"__type": api.refuse, "message": "no"})
            return
        password = uuid.uuid4().hex
        api.logins["AWS"] = password
        token = base64.b64encode(f"AWS:{password}".encode()).decode()
        data = {"authorizationToken": token, "expiresAt": time.time() + api.lifetime, "proxyEndpoint": "https://x"}
        self._answer(200, {"authorizationData": [data]})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
