"""Where credentials come from, on loopback: an instance's metadata, a container's endpoint, STS, an SSO portal.

`Issuer` makes keys that the tests' S3 gate accepts. `rotate()` makes new ones and withdraws the old, whatever their
expiry said.
"""

from __future__ import annotations

import json
import threading
import uuid
from datetime import datetime, timedelta, timezone
from urllib.parse import parse_qs

from support.answering import AnsweringServer, Reply


class Issuer:
    """Keys with session tokens for `gate`; `lifetime` is what their receivers are told, in seconds."""

    def __init__(self, gate, lifetime=3600):
        self.gate, self.lifetime = gate, lifetime
        self.issued = 0
        self._lock = threading.Lock()
        gate.accepted = {}
        self.rotate()

    def rotate(self):
        with self._lock:
            for token in self.gate.accepted.values():
                self.gate.expired.add(token)
            self.key, self.secret, self.token = (f"{n}{uuid.uuid4().hex}" for n in ("AKIA", "secret", "token"))
            self.gate.accepted = {self.key: self.token}

    def issue(self):
        """(access key, secret, token, expiry) as of now."""
        with self._lock:
            self.issued += 1
            end = datetime.now(timezone.utc) + timedelta(seconds=self.lifetime)
            return self.key, self.secret, self.token, f"{end:%Y-%m-%dT%H:%M:%SZ}"


class InstanceMetadata(AnsweringServer):
    """EC2's, version 2; `silent` makes it fail."""

    def __init__(self, issuer):
        self._issuer, self.silent = issuer, False
        super().__init__()

    def environment(self):
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"{self.url}/", "AWS_EC2_METADATA_DISABLED": "false"}

    def answer(self, request):
        if self.silent:
            return Reply(500)
        if request.path == "/latest/api/token":
            return Reply(200, b"a-session", {"Content-Type": "text/plain"})
        if request.headers.get("x-aws-ec2-metadata-token") != "a-session":
            return Reply(401)
        if request.path.endswith("/security-credentials/"):
            return Reply(200, b"the-role")
        key, secret, token, expiry = self._issuer.issue()
        found = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": key, "SecretAccessKey": secret}
        return Reply(200, json.dumps({**found, "Token": token, "Expiration": expiry}).encode())


class ContainerEndpoint(AnsweringServer):
    """What ECS tasks and EKS pods ask."""

    def __init__(self, issuer):
        self._issuer = issuer
        super().__init__()

    def environment(self):
        return {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.url}/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a-pod",
        }

    def answer(self, request):
        if request.headers.get("authorization") != "a-pod":
            return Reply(403, b"{}")
        key, secret, token, expiry = self._issuer.issue()
        found = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": token, "Expiration": expiry}
        return Reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})


class TokenService(AnsweringServer):
    """STS: keys for a web identity token, which must be the one that `file` holds now."""

    def __init__(self, issuer, file):
        self._issuer, self._file = issuer, file
        super().__init__()
        file.write_text("web-identity-1")

    def environment(self):
        return {
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/floe",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(self._file),
            "AWS_ENDPOINT_URL_STS": self.url,
        }

    def answer(self, request):
        form = parse_qs(request.body.decode())
        if form.get("Action") != ["AssumeRoleWithWebIdentity"]:
            return Reply(400)
        if form.get("WebIdentityToken") != [self._file.read_text()]:
            return Reply(400, b"<ErrorResponse><Error><Code>ExpiredTokenException</Code></Error></ErrorResponse>")
        key, secret, token, expiry = self._issuer.issue()
        body = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            f"<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId>"
            f"<SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{token}</SessionToken>"
            f"<Expiration>{expiry}</Expiration></Credentials><AssumedRoleUser><Arn>a</Arn><AssumedRoleId>b"
            "</AssumedRoleId></AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        return Reply(200, body.encode(), {"Content-Type": "text/xml"})


class LoginPortal(AnsweringServer):
    """An SSO portal, and the configuration and cached login that `aws sso login` would have left in `folder`."""

    def __init__(self, issuer, folder):
        self._issuer, self._folder = issuer, folder
        super().__init__()
        self.config = folder / "config"
        start = "https://login.example/start"
        self.config.write_text(
            f"[default]\nsso_start_url = {start}\nsso_region = us-east-1\nsso_account_id = 123456789012\n"
            f"sso_role_name = floe\nservices = here\n[services here]\nsso =\n  endpoint_url = {self.url}\n"
        )
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.start = start

    def login(self, name, lifetime=3600):
        end = datetime.now(timezone.utc) + timedelta(seconds=lifetime)
        login = {"startUrl": self.start, "accessToken": "a-login", "expiresAt": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        (self.cache / f"{name}.json").write_text(json.dumps(login))

    def answer(self, request):
        if request.headers.get("x-amz-sso_bearer_token") != "a-login":
            return Reply(401, b"{}")
        key, secret, token, _ = self._issuer.issue()
        end = int((datetime.now(timezone.utc).timestamp() + self._issuer.lifetime) * 1000)
        found = {"accessKeyId": key, "secretAccessKey": secret, "sessionToken": token, "expiration": end}
        return Reply(200, json.dumps({"roleCredentials": found}).encode(), {"Content-Type": "application/json"})
