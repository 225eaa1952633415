"""A front before a real S3 server: it checks whose credentials are used, refuses what it is told to, and counts.

What passes is signed anew and handed on to the server behind. It does not check signatures, only who signs and with
which session token; conditions can be refused or dropped, as lesser servers do, and encryption is noted and dropped.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections import Counter
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from support.answering import AnsweringServer, Reply

_SIGNER = re.compile(r"Credential=([^/]+)/")
_CONDITIONS = ("if-match", "if-none-match")
_DROPPED = {
    "authorization", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256", "host", "connection", "expect",
    "accept-encoding", "amz-sdk-invocation-id", "amz-sdk-request", "user-agent",
}  # fmt: skip


class S3Gate(AnsweringServer):
    """Before `weed`, a running Seaweed. `url` is the endpoint.

    `accepted`: access key -> session token (None: none) of those let in; `expired`: tokens that were let in once.
    `denied`: actions refused, such as s3:PutObject. `conditions`: "honoured", "ignored" or "refused".
    `allowed(action, bucket, key)` says what else is let in.
    `before(action, key)` is called with each request that passes, and may raise to leave it without an answer.
    """

    def __init__(self, weed, accepted, tls=None):
        self._behind = urlsplit(weed.endpoint)
        self._weed = weed
        self.accepted = dict(accepted)
        self.expired = set()
        self.denied = set()
        self.allowed = lambda _action, _bucket, _key: True
        self.reason = ""  # what refusals say; by default which action it was
        self.conditions = "honoured"
        self.before = lambda _action, _key: None
        self.actions = Counter()  # of requests that passed
        self.refusals = Counter()  # by code
        self.parts = Counter()  # (key, part number) -> how often it arrived whole
        self.encrypted = set()  # (action, algorithm, key id)
        self._lock = threading.Lock()
        self._local = threading.local()
        super().__init__(tls)

    def address(self, bucket, prefix="", **options):
        path = f"{bucket}/{prefix}" if prefix else bucket
        options = {"endpoint": self.url, "region": "us-east-1", **options}
        return f"s3://{path}?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())

    def answer(self, request):
        action, key = _action(request)
        code = self._refusal(request, action, key)
        if code:
            with self._lock:
                self.refusals[code] += 1
            status = {"ExpiredToken": 400, "NotImplemented": 501}.get(code, 403)
            body = b"" if request.method == "HEAD" else _xml_error(code, self.reason or f"no {action}").encode()
            return Reply(status, body, {"Content-Type": "application/xml"})
        self.before(action, key)
        with self._lock:
            self.actions[action] += 1
            if "partNumber" in request.query and request.method == "PUT":
                self.parts[key, int(request.query["partNumber"])] += 1
            if algorithm := request.headers.get("x-amz-server-side-encryption"):
                key_id = request.headers.get("x-amz-server-side-encryption-aws-kms-key-id")
                self.encrypted.add((action, algorithm, key_id))
        return self._pass_on(request)

    def _refusal(self, request, action, key):
        signed = request.headers.get("authorization") or f"Credential={request.query.get('X-Amz-Credential', '')}"
        signer = _SIGNER.search(signed)
        token = request.headers.get("x-amz-security-token") or request.query.get("X-Amz-Security-Token")
        if token in self.expired:
            return "ExpiredToken"
        if signer is None or signer[1] not in self.accepted:
            return "InvalidAccessKeyId"
        if self.accepted[signer[1]] != token:
            return "InvalidToken"
        if action in self.denied or not self.allowed(action, request.path.split("/", 2)[1], key):
            return "AccessDenied"
        if self.conditions == "refused" and any(name in request.headers for name in _CONDITIONS):
            return "NotImplemented"
        return ""

    def _pass_on(self, request):
        dropped = set(_DROPPED) | {n for n in request.headers if n.startswith("x-amz-server-side-encryption")}
        if self.conditions == "ignored":
            dropped |= set(_CONDITIONS)
        headers = {name: value for name, value in request.headers.items() if name not in dropped}
        path, _, query = request.target.partition("?")
        words = [
            word for word in query.split("&") if word and not word.startswith("X-Amz-")
        ]  # of an address that is signed
        target = f"{path}?{'&'.join(words)}" if words else path
        signed = AWSRequest(request.method, f"{self._weed.endpoint}{target}", headers=headers, data=request.body)
        own = self._weed.environment()
        S3SigV4Auth(Credentials(own["AWS_ACCESS_KEY_ID"], own["AWS_SECRET_ACCESS_KEY"]), "s3", "us-east-1").add_auth(
            signed
        )
        connection = http.client.HTTPConnection(self._behind.hostname, self._behind.port, timeout=60)
        try:
            connection.request(request.method, target, request.body, dict(signed.headers.items()))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        kept = {
            n: v
            for n, v in answer.getheaders()
            if n.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        return Reply(answer.status, body, kept)


def _action(request):
    """The permission that AWS would ask for, and the key."""
    _, _, *rest = request.path.split("/", 2)
    key = rest[0] if rest else ""
    query = request.query
    if not key:
        if "uploads" in query:
            return "s3:ListBucketMultipartUploads", ""
        if request.method == "PUT":
            return "s3:CreateBucket", ""
        return "s3:ListBucket", ""
    if "uploadId" in query and request.method == "GET":
        return "s3:ListMultipartUploadParts", key
    if "uploadId" in query and request.method == "DELETE":
        return "s3:AbortMultipartUpload", key
    by_method = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}
    return by_method.get(request.method, "s3:PutObject"), key


def _xml_error(code, message):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
