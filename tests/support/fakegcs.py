"""Google Cloud Storage as far as Floe uses it, in memory: the emulators to be had do not speak the XML API.

Objects by the XML API with generations and their preconditions, multipart uploads with S3's rules (5 MiB at least for all
parts but the last), lists and buckets by the JSON API, and a token server for key files. It is written after Google's
documentation; what Google does otherwise, it does not show.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
import time
import uuid
import xml.etree.ElementTree as ET
from datetime import datetime, timezone
from email.utils import formatdate
from urllib.parse import parse_qs, quote

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from support.answering import AnsweringServer, Reply

_LEAST = 5 << 20  # bytes of a part, except the last


class FakeGCS(AnsweringServer):
    """`address(bucket, prefix)` is a store's. `denied`: permissions refused, such as storage.objects.create.

    `tokens`: those accepted; None takes any. `give_token()` makes the token server's next ones different and
    `withdraw()` ends the validity of those before. `before(permission, name)` is called with each request.
    """

    def __init__(self, tls=None):
        self.denied = set()
        self.tokens = None
        self.lifetime = 3600  # seconds that the token server says a token lasts
        self.given = []
        self.before = lambda _permission, _name: None
        self.parts = {}  # (name, part number) -> how often it arrived whole
        self._lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._buckets = {}  # name -> object name -> (data, generation, etag)
        self._written = {}  # generation -> when, as POSIX seconds
        self._uploads = {}  # id -> [bucket, name, begun, {number: data}]
        super().__init__(tls)

    def bucket(self, name=None):
        name = name or f"floe-{uuid.uuid4().hex[:12]}"
        self._buckets[name] = {}
        return name

    def address(self, bucket, prefix="", **options):
        path = f"{bucket}/{prefix}" if prefix else bucket
        options = {"endpoint": self.url, **options}
        return f"gs://{path}?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())

    def key_file(self, path):
        """A service account's key file whose tokens come from here; from now on only such tokens are accepted."""
        self.tokens = set()
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account", "project_id": "tests", "private_key_id": "1", "private_key": key.decode(),
            "client_email": "floe@tests.iam.gserviceaccount.com", "client_id": "1", "token_uri": f"{self.url}/token",
        }  # fmt: skip
        path.write_text(json.dumps(account))
        return path

    def uploads(self):
        with self._lock:
            return {upload: [name, sorted(parts)] for upload, (_, name, _, parts) in self._uploads.items()}

    def answer(self, request):
        if request.path == "/token":
            return self._token(request)
        if self.tokens is not None and request.headers.get("authorization", "")[7:] not in self.tokens:
            return _error(401, "AuthenticationRequired", "Authentication required.")
        if request.path.startswith("/storage/v1/b"):
            return self._json(request)
        _, bucket, *rest = request.path.split("/", 2)
        return self._xml(request, bucket, rest[0] if rest else "")

    # Tokens

    def _token(self, request):
        form = parse_qs(request.body.decode())
        assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
        token = f"token-{uuid.uuid4().hex}"
        self.given.append(token)
        self.tokens.add(token)
        return _json({"access_token": token, "expires_in": self.lifetime, "token_type": "Bearer"})

    def withdraw(self):
        self.tokens.clear()

    # The JSON API

    def _json(self, request):
        parts = request.path.removeprefix("/storage/v1/b").strip("/").split("/")
        if request.method == "POST" and parts == [""]:
            return self._create_bucket(json.loads(request.body)["name"])
        bucket = parts[0]
        if bucket not in self._buckets:
            return _json_error(404, "The specified bucket does not exist.")
        listing = parts[1:] == ["o"]
        permission = "storage.objects.list" if listing else "storage.buckets.get"
        if self._refuses(permission, ""):
            return _json_error(403, f"no {permission}")
        return self._list(bucket, request.query) if listing else _json({"name": bucket})

    def _create_bucket(self, name):
        if self._refuses("storage.buckets.create", name):
            return _json_error(403, "no storage.buckets.create")
        if name in self._buckets:
            return _json_error(
                409, "Your previous request to create the named bucket succeeded and you already own it."
            )
        self.bucket(name)
        return _json({"name": name})

    def _list(self, bucket, query):
        with self._lock:
            names = sorted(n for n in self._buckets[bucket] if n.startswith(query.get("prefix", "")))
            after = query.get("pageToken", "")
            names = [name for name in names if name > after]
            page = names[: int(query.get("maxResults", 1000))]
            items = [
                {
                    "name": n,
                    "size": str(len(self._buckets[bucket][n][0])),
                    "generation": str(self._buckets[bucket][n][1]),
                    "timeCreated": self._created(self._buckets[bucket][n][1]),
                }
                for n in page
            ]
        return _json({"items": items, **({"nextPageToken": page[-1]} if len(names) > len(page) else {})})

    def _next_generation(self):
        generation = next(self._generations)
        self._written[generation] = time.time()
        return generation

    def _created(self, generation):
        written = datetime.fromtimestamp(self._written[generation], timezone.utc)
        return written.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    # The XML API

    def _xml(self, request, bucket, name):
        method, query = request.method, request.query
        multipart = "uploads" in query or "uploadId" in query
        permission = {
            ("GET", True): "storage.multipartUploads.listParts" if name else "storage.multipartUploads.list",
            ("POST", True): "storage.multipartUploads.create",
            ("PUT", True): "storage.multipartUploads.create",
            ("DELETE", True): "storage.multipartUploads.abort",
            ("PUT", False): "storage.objects.create",
            ("DELETE", False): "storage.objects.delete",
        }.get((method, multipart), "storage.objects.get")
        if self._refuses(permission, name):
            return _error(403, "AccessDenied", f"no {permission}")
        with self._lock:
            if bucket not in self._buckets:
                return _error(404, "NoSuchBucket", "The specified bucket does not exist.")
            objects = self._buckets[bucket]
            if multipart:
                return self._multipart(request, bucket, name)
            if not name:
                return _error(501, "NotImplemented", "only the JSON API lists here")
            if method == "PUT":
                return self._put(objects, name, request)
            if method == "DELETE":
                return Reply(204) if objects.pop(name, None) else _error(404, "NoSuchKey", "No such key.")
            return self._get(objects, name, request)

    def _put(self, objects, name, request):
        wanted = request.headers.get("x-goog-if-generation-match")
        if wanted is not None and int(wanted) != (objects[name][1] if name in objects else 0):
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        if name in objects and self._refuses("storage.objects.delete", name):
            return _error(403, "AccessDenied", "no storage.objects.delete")
        generation = self._next_generation()
        etag = hashlib.md5(request.body).hexdigest()
        objects[name] = (request.body, generation, etag)
        return Reply(200, b"", {"ETag": f'"{etag}"', "x-goog-generation": str(generation)})

    def _get(self, objects, name, request):
        if name not in objects:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        data, generation, etag = objects[name]
        headers = {
            "ETag": f'"{etag}"',
            "x-goog-generation": str(generation),
            "Last-Modified": formatdate(self._written[generation], usegmt=True),
        }
        status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        body = data
        if span:
            start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return _error(416, "InvalidRange", "The requested range cannot be satisfied.")
            status, body = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        if request.method == "HEAD":
            headers["Content-Length"] = str(len(body))
        return Reply(status, body, headers)

    def _multipart(self, request, bucket, name):
        method, query = request.method, request.query
        if not name:
            return self._list_uploads(bucket, query.get("prefix", ""))
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self._uploads[upload] = [bucket, name, datetime.now(timezone.utc), {}]
            return _xml("InitiateMultipartUploadResult", {"Bucket": bucket, "Key": name, "UploadId": upload})
        upload = query["uploadId"]
        if self._uploads.get(upload, [None, None])[:2] != [bucket, name]:
            return _error(404, "NoSuchUpload", "The requested upload was not found.")
        parts = self._uploads[upload][3]
        if method == "PUT":
            return self._put_part(request, name, parts)
        if method == "DELETE":
            del self._uploads[upload]
            return Reply(204)
        if method == "GET":
            return self._list_parts(parts, query)
        return self._complete(request, bucket, name, upload)

    def _put_part(self, request, name, parts):
        number, digest = int(request.query["partNumber"]), hashlib.md5(request.body).digest()
        if request.headers.get("content-md5") not in (None, base64.b64encode(digest).decode()):
            return _error(400, "BadDigest", "The MD5 you specified did not match.")
        parts[number] = request.body
        self.parts[name, number] = self.parts.get((name, number), 0) + 1
        return Reply(200, b"", {"ETag": f'"{digest.hex()}"'})

    def _list_uploads(self, bucket, prefix):
        found = [
            {"Key": name, "UploadId": upload, "Initiated": f"{begun:%Y-%m-%dT%H:%M:%S}.438Z"}
            for upload, (where, name, begun, _) in self._uploads.items()
            if where == bucket and name.startswith(prefix)
        ]
        return _xml("ListMultipartUploadsResult", {"IsTruncated": "false"}, "Upload", found)

    def _list_parts(self, parts, query):
        numbers = [n for n in sorted(parts) if n > int(query.get("part-number-marker", 0))]
        page = numbers[:3]  # Google's own limit is 1,000: so that a second page is asked for
        found = [
            {"PartNumber": str(n), "Size": str(len(parts[n])), "ETag": f'"{hashlib.md5(parts[n]).hexdigest()}"'}
            for n in page
        ]
        more = {
            "IsTruncated": str(len(numbers) > len(page)).lower(),
            "NextPartNumberMarker": str(page[-1] if page else 0),
        }
        return _xml("ListPartsResult", more, "Part", found)

    def _complete(self, request, bucket, name, upload):
        parts = self._uploads[upload][3]
        listed = [
            (int(p.findtext("PartNumber")), p.findtext("ETag").strip('"'))
            for p in ET.fromstring(request.body).iter("Part")
        ]
        for number, etag in listed:
            if number not in parts or hashlib.md5(parts[number]).hexdigest() != etag:
                return _error(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if any(len(parts[number]) < _LEAST for number, _ in listed[:-1]):
            return _error(400, "EntityTooSmall", "A part but the last is smaller than allowed.")
        generation = self._next_generation()
        data = b"".join(parts[number] for number, _ in listed)
        self._buckets[bucket][name] = (data, generation, f"-{generation:x}=")  # no MD5, as with Google
        del self._uploads[upload]
        return _xml("CompleteMultipartUploadResult", {"Bucket": bucket, "Key": name, "ETag": f'"-{generation:x}="'})

    def _refuses(self, permission, name):
        self.before(permission, name)
        return permission in self.denied


def _json(value, status=200):
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _json_error(status, message):
    return _json({"error": {"code": status, "message": message}}, status)


def _error(status, code, message):
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, body.encode(), {"Content-Type": "application/xml"})


def _xml(name, fields, item="", items=()):
    root = ET.Element(name, xmlns="http://doc.s3.amazonaws.com/2006-03-01")
    for key, value in fields.items():
        ET.SubElement(root, key).text = value
    for values in items:
        element = ET.SubElement(root, item)
        for key, value in values.items():
            ET.SubElement(element, key).text = value
    return Reply(200, ET.tostring(root), {"Content-Type": "application/xml"})
