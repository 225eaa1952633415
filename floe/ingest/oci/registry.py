"""Images in a registry: the pull and push halves of the distribution API, version 2.

Source: OCI distribution-spec, "Pull" and "Push". A blob download that breaks goes on where it stopped (Range);
what arrives is hashed as it passes.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import requests
import urllib3

from floe.ingest.oci import auth, media
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.references import RegistryRef
from floe.ingest.oci.source import Source, verified
from floe.ingest.oci.transport import Transport
from floe.store.errors import DamagedError, FloeError, NotFoundError, UnavailableError

_PIECE = 256 << 10  # bytes
_BROKEN_MAX = 5  # breaks of a download in a row without a byte in between
_BACKOFF = 0.2  # seconds
_UPLOAD_CHUNK = 32 << 20  # bytes sent by one PATCH


class Registry:
    """The image `ref` in its registry, to read and to write. Thread-safe."""

    def __init__(
        self, ref: RegistryRef, *, plain_http: bool = False, credentials: auth.Credentials | None = None
    ) -> None:
        self.ref = ref
        self.name = str(ref)
        self._transport = Transport(
            ref.host, plain_http=plain_http, credentials=credentials or auth.load_credentials(ref.host)
        )
        self._pull = (f"repository:{ref.repository}:pull",)
        self._push = (f"repository:{ref.repository}:pull,push",)

    def close(self) -> None:
        """See Source.close."""
        self._transport.close()

    # Reading

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest."""
        reference = descriptor.digest if descriptor else self.ref.reference
        expected = descriptor.digest if descriptor else self.ref.digest
        what = f"manifest {reference} of {self.name}"
        with self._transport.request(
            "GET",
            f"{self.ref.repository}/manifests/{reference}",
            scopes=self._pull,
            headers={"Accept": media.ACCEPT},
            what=f"cannot read image {self.name}",
        ) as response:
            raw = self._whole(response, media.MAX_MANIFEST, what)
            kind = response.headers.get("Content-Type", "")
            said = response.headers.get("Docker-Content-Digest", "")
        found = media.sha256_digest(raw)
        for digest in (expected, said if said.startswith("sha256:") else None):
            if digest is not None and digest != found:
                raise DamagedError(f"{what} does not match its digest {digest}: its content is {found}")
        return raw, kind

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        return verified(self._download(descriptor), descriptor, self.name)

    def _download(self, descriptor: Descriptor) -> Iterator[bytes]:
        """The blob's bytes, over as many requests as it takes."""
        at = broken = 0
        while True:
            try:
                for piece in self._download_from(descriptor, at):
                    at += len(piece)
                    broken = 0
                    yield piece
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as failure:
                broken += 1
                if broken >= _BROKEN_MAX:
                    raise self._transport.unreachable(failure, f"blob {descriptor.digest} of {self.name}") from failure
                time.sleep(_BACKOFF * 2**broken * random.uniform(0.5, 1.0))
                continue
            return

    def _download_from(self, descriptor: Descriptor, at: int) -> Iterator[bytes]:
        if at and at >= descriptor.size:
            return
        headers = {"Accept-Encoding": "identity"}
        if at:
            headers["Range"] = f"bytes={at}-"
        with self._transport.request(
            "GET",
            f"{self.ref.repository}/blobs/{descriptor.digest}",
            scopes=self._pull,
            headers=headers,
            what=f"cannot read blob {descriptor.digest} of {self.name}",
        ) as response:
            skip = at
            if response.status_code == 206:
                start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
                if start != str(at):
                    raise DamagedError(f"registry {self.ref.host} answered another range than bytes {at} and on")
                skip = 0
            while True:
                piece = response.raw.read(_PIECE, decode_content=False)
                if not piece:
                    return
                if skip:
                    passed = min(skip, len(piece))
                    skip -= passed
                    piece = piece[passed:]
                if piece:
                    yield piece

    # Writing

    def has_blob(self, descriptor: Descriptor) -> bool:
        """See Target.has_blob."""
        with self._transport.request(
            "HEAD",
            f"{self.ref.repository}/blobs/{descriptor.digest}",
            scopes=self._push,
            what=f"cannot look for blob {descriptor.digest} of {self.name}",
            accept=(404,),
        ) as response:
            return response.status_code == 200

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """See Target.mount_blob: asks for a blob of another repository of the same registry."""
        if not isinstance(source, Registry) or source.ref.host != self.ref.host:
            return False
        query = urlencode({"mount": descriptor.digest, "from": source.ref.repository})
        try:
            with self._transport.request(
                "POST",
                f"{self.ref.repository}/blobs/uploads/?{query}",
                scopes=(*self._push, f"repository:{source.ref.repository}:pull"),
                headers={"Content-Length": "0"},
                what=f"cannot write to {self.name}",
            ) as response:
                if response.status_code == 201:
                    return True
                location = self._location(response)
        except NotFoundError:
            return False
        # The registry began an ordinary upload instead; it is not used.
        with contextlib.suppress(FloeError):  # an upload nobody goes on with expires by itself
            self._transport.request("DELETE", location, scopes=self._push, what="", accept=range(300, 600)).close()
        return False

    def push_blob(self, descriptor: Descriptor, pieces: Iterable[bytes]) -> None:
        """See Target.push_blob. Sent in parts; a part that fails is not sent again."""
        what = f"cannot write blob {descriptor.digest} to {self.name}"
        with self._transport.request(
            "POST",
            f"{self.ref.repository}/blobs/uploads/",
            scopes=self._push,
            headers={"Content-Length": "0"},
            what=what,
        ) as response:
            location = self._location(response)
        at = 0
        for part in _parts(verified(pieces, descriptor, self.name), _UPLOAD_CHUNK):
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{at}-{at + len(part) - 1}",
                "Content-Length": str(len(part)),
            }
            with self._transport.request(
                "PATCH",
                location,
                scopes=self._push,
                headers=headers,
                data=functools.partial(bytes, part),
                what=what,
                attempts=1,
            ) as response:
                location = self._location(response)
            at += len(part)
        with self._transport.request(
            "PUT",
            _with_query(location, {"digest": descriptor.digest}),
            scopes=self._push,
            headers={"Content-Length": "0"},
            what=what,
        ):
            pass

    def put_manifest(self, raw: bytes, media_type: str) -> None:
        """See Target.put_manifest."""
        with self._transport.request(
            "PUT",
            f"{self.ref.repository}/manifests/{self.ref.reference}",
            scopes=self._push,
            headers={"Content-Type": media_type},
            data=lambda: raw,
            what=f"cannot write manifest of {self.name}",
        ):
            pass

    def _location(self, response: requests.Response) -> str:
        location = response.headers.get("Location")
        if not location:
            raise UnavailableError(f"registry {self.ref.host} accepts an upload without saying where")
        return urljoin(response.url, location)

    def _whole(self, response: requests.Response, limit: int, what: str) -> bytes:
        try:
            raw = response.raw.read(limit + 1, decode_content=True)
        except (urllib3.exceptions.HTTPError, OSError) as failure:
            raise self._transport.unreachable(failure, f"cannot read {what}") from failure
        if len(raw) > limit:
            raise DamagedError(f"{what} is larger than {limit} bytes")
        return bytes(raw)


def _parts(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """`pieces` joined to parts of at least `size` bytes, but for the last."""
    waiting: list[bytes] = []
    length = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield b"".join(waiting)


def _with_query(url: str, more: dict[str, str]) -> str:
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    return urlunsplit(parts._replace(query=urlencode([*query, *more.items()])))
