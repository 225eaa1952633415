"""Images in a registry: the pull and push halves of the distribution API, version 2.

Source: OCI distribution-spec, "Pull" and "Push". A blob download that breaks goes on where it stopped (Range);
what arrives is hashed as it passes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import requests
import urllib3

from floe.ingest.oci import hosts, httpfailure, media
from floe.ingest.oci.credentialsource import CredentialSource
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.references import RegistryRef
from floe.ingest.oci.source import Source, verified
from floe.ingest.oci.taken import BLOB, MANIFEST, TAKEN
from floe.ingest.oci.transport import ATTEMPTS, Transport
from floe.store.errors import AccessDeniedError, BadInputError, DamagedError, FloeError, NotFoundError, UnavailableError

_PIECE = 256 << 10  # bytes
_BROKEN_MAX = 5  # breaks of a download in a row without a byte in between
_SHORT_MAX = 2  # answers in a row that ended in good order without a byte
_MIRROR_BROKEN_MAX = 2  # after so many the next server is asked
_BACKOFF = 0.2  # seconds
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Registry:
    """The image `ref` in its registry, to read and to write. Thread-safe.

    It is read from the servers that the hosts.toml files below `registry_config` name, in their order, each for what
    it is said to be able to do. `plain_http`: the registry itself is spoken to without TLS. BadInputError: such a file,
    or a certificate that it names, cannot be used.
    """

    def __init__(self, ref: RegistryRef, *, plain_http: bool = False, registry_config: Sequence[Path] = ()) -> None:
        self.ref = ref
        self.name = str(ref)
        endpoints = hosts.find_endpoints(ref.host, registry_config, plain_http=plain_http)
        sources = {endpoint.host: CredentialSource(endpoint.host) for endpoint in endpoints}
        self._transports = [
            Transport(endpoint, sources[endpoint.host], plain_http=plain_http and not endpoint.mirror)
            for endpoint in endpoints
        ]
        self._left_out: set[Transport] = set()  # mirrors that failed; a set's methods are atomic
        self._pull = (f"repository:{ref.repository}:pull",)
        self._push = (f"repository:{ref.repository}:pull,push",)

    def close(self) -> None:
        """See Source.close."""
        for transport in self._transports:
            transport.close()

    def _able(self, *capabilities: str) -> list[Transport]:
        """The servers that may be asked; never empty."""
        able = [t for t in self._transports if t.endpoint.capabilities.issuperset(capabilities)]
        if not able:
            raise BadInputError(
                f"no server for {self.name} may {' and '.join(capabilities)}",
                hint="see 'capabilities' in the hosts.toml that registry_config leads to",
            )
        return [t for t in able if t not in self._left_out] or able[-1:]

    def _first(self, transports: list[Transport], ask: Callable[[Transport, int], T]) -> T:
        """What `ask(server, attempts)` gives for the first of the servers that does not fail."""
        failures: list[FloeError] = []
        for transport in transports:
            last = transport is transports[-1]
            try:
                return ask(transport, ATTEMPTS if last else 1)
            except FloeError as failure:
                if isinstance(failure, UnavailableError) and not last:
                    self._left_out.add(transport)
                failures.append(failure)
        *before, final = failures
        if before:
            text = "; ".join(map(str, before))
            raise type(final)(f"{final} (tried before: {text})", hint=final.hint) from final
        raise final

    def _url(self, transport: Transport, path: str) -> str:
        """`path` of the repository, relative to the API's root; a mirror is told whose repository is meant."""
        query = "?" + urlencode({"ns": self.ref.host}) if transport.endpoint.mirror else ""
        return f"{self.ref.repository}/{path}{query}"

    # Reading

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest."""
        reference = descriptor.digest if descriptor else self.ref.reference
        digest = descriptor.digest if descriptor else self.ref.digest
        able = self._able(hosts.PULL) if digest else self._able(hosts.PULL, hosts.RESOLVE)
        return self._first(able, lambda server, attempts: self._manifest(server, reference, digest, attempts))

    def _manifest(self, server: Transport, reference: str, expected: str | None, attempts: int) -> tuple[bytes, str]:
        what = f"manifest {reference} of {self.name}"
        with server.request(
            "GET",
            self._url(server, f"manifests/{reference}"),
            scopes=self._pull,
            headers={"Accept": media.ACCEPT},
            what=f"cannot read image {self.name}",
            attempts=attempts,
        ) as response:
            TAKEN.answered(MANIFEST)
            raw = self._whole(server, response, media.MAX_MANIFEST, what)
            kind = response.headers.get("Content-Type", "")
            said = response.headers.get("Docker-Content-Digest", "")
        found = media.sha256_digest(raw)
        for digest in (expected, said if said.startswith("sha256:") else None):
            if digest is not None and digest != found:
                raise DamagedError(
                    f"{what}, from {server.name}, does not match its digest {digest}: its content is {found}"
                )
        return raw, kind

    def lacks_manifest(self) -> bool:
        """Whether the registry itself, no mirror, says that it has no such manifest: 404 and MANIFEST_UNKNOWN, nothing less.

        Everything else that is no answer raises: UnavailableError, AccessDeniedError, or NotFoundError for another 404 (of a
        proxy, or a registry that moved).
        """
        server = self._able(hosts.PULL, hosts.RESOLVE)[-1]
        if server.endpoint.mirror:
            raise UnavailableError(f"only mirrors are known for {self.name}", hint="see hosts.toml")
        for method in ("HEAD", "GET"):  # a HEAD costs no pull of a rate limit, and says no reason
            with server.request(
                method,
                self._url(server, f"manifests/{self.ref.reference}"),
                scopes=self._pull,
                headers={"Accept": media.ACCEPT},
                what=f"cannot look for image {self.name}",
                accept=(404,),
            ) as response:
                if response.status_code != 404:
                    return False
                codes = httpfailure.codes(response) if method == "GET" else []
        if "MANIFEST_UNKNOWN" in codes:
            return True
        said = ", ".join(codes) or "no reason"
        raise NotFoundError(f"{server.name} answered 404 for {self.name}, with {said}: that is no word of a deletion")

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        mirrors: list[Transport] = []
        try:
            yield from verified(self._download(descriptor, mirrors), descriptor, self.name)
        except DamagedError as error:
            if not mirrors:
                raise
            names = ", ".join(dict.fromkeys(mirror.name for mirror in mirrors))
            raise DamagedError(f"{error} (from {names})", hint="repair the mirror, or take it out") from error

    def _download(self, descriptor: Descriptor, mirrors: list[Transport]) -> Iterator[bytes]:
        """The blob's bytes, over as many requests, and from as many servers, as it takes."""
        at = broken = 0
        while True:
            able = self._able(hosts.PULL)
            at_first = at
            server, response = self._first(able, functools.partial(self._open, descriptor, at))
            if server.endpoint.mirror:
                mirrors.append(server)
            failure: Exception | None = None
            try:
                with response:
                    for piece in _pieces(response, at):
                        at += len(piece)
                        yield piece
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                failure = error
            if at >= descriptor.size:
                return
            broken = 1 if at > at_first else broken + 1
            if broken >= _MIRROR_BROKEN_MAX and server is not able[-1]:
                self._left_out.add(server)
                broken = 0
            elif failure is None and broken >= _SHORT_MAX:
                return  # the server has no more of it: too short, as will be said
            elif failure is not None and broken >= _BROKEN_MAX:
                raise server.unreachable(failure, f"blob {descriptor.digest} of {self.name}") from failure
            else:
                time.sleep(_BACKOFF * 2**broken * random.uniform(0.5, 1.0))

    def _open(
        self, descriptor: Descriptor, at: int, server: Transport, attempts: int
    ) -> tuple[Transport, requests.Response]:
        """An answer that holds the blob from byte `at` on, or whole."""
        headers = {"Accept-Encoding": "identity"}
        if at:
            headers["Range"] = f"bytes={at}-"
        response = server.request(
            "GET",
            self._url(server, f"blobs/{descriptor.digest}"),
            scopes=self._pull,
            headers=headers,
            what=f"cannot read blob {descriptor.digest} of {self.name}",
            accept=(416,) if at else (),  # there is nothing from that byte on
            attempts=attempts,
        )
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if response.status_code == 206 and start != str(at):
            response.close()
            raise DamagedError(f"{server.name} answered another range than bytes {at} and on")
        if response.status_code != 416:
            TAKEN.answered(BLOB)
        return server, response

    # Writing

    def _writer(self) -> Transport:
        return self._able(hosts.PUSH)[0]

    def has_blob(self, descriptor: Descriptor) -> bool:
        """See Target.has_blob."""
        server = self._writer()
        with server.request(
            "HEAD",
            self._url(server, f"blobs/{descriptor.digest}"),
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
            with self._writer().request(
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
            self._writer().request("DELETE", location, scopes=self._push, what="", accept=range(300, 600)).close()
        return False

    def push_blob(self, descriptor: Descriptor, opened: Callable[[], Iterable[bytes]]) -> None:
        """See Target.push_blob. In one part, as not every registry takes several; begun anew after an error that passes."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._upload(descriptor, opened)
            except UnavailableError as error:
                if attempt == ATTEMPTS:
                    raise
                _log.info("%s; it is tried again", error)
                time.sleep(_BACKOFF * 2**attempt * random.uniform(0.5, 1.0))
                if self.has_blob(descriptor):  # only the answer was lost
                    return
            else:
                return

    def _upload(self, descriptor: Descriptor, opened: Callable[[], Iterable[bytes]]) -> None:
        what = f"cannot write blob {descriptor.digest} to {self.name}"
        with self._writer().request(
            "POST",
            f"{self.ref.repository}/blobs/uploads/",
            scopes=self._push,
            headers={"Content-Length": "0"},
            what=what,
        ) as response:
            location = self._location(response)
        with self._writer().request(
            "PATCH",
            location,
            scopes=self._push,
            headers={"Content-Type": "application/octet-stream"},
            data=lambda: _Body(verified(opened(), descriptor, self.name), descriptor.size),
            what=what,
            attempts=1,
        ) as response:
            location = self._location(response)
        with self._writer().request(
            "PUT",
            _with_query(location, {"digest": descriptor.digest}),
            scopes=self._push,
            headers={"Content-Length": "0"},
            what=what,
            attempts=1,  # after one that was answered, and whose answer was lost, there is no such upload any more
        ):
            pass

    def put_manifest(self, raw: bytes, media_type: str, *, named: bool = True) -> None:
        """See Target.put_manifest."""
        reference = self.ref.reference if named else media.sha256_digest(raw)
        with self._writer().request(
            "PUT",
            f"{self.ref.repository}/manifests/{reference}",
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
        try:
            where = urljoin(response.url, location)
            there = urlsplit(where)
        except ValueError as failure:
            raise UnavailableError(
                f"registry {self.ref.host} accepts an upload at {location!r}, which is no address",
                hint="check the registry, and what stands before it",
            ) from failure
        if urlsplit(response.url).scheme == "https" and there.scheme != "https":
            raise AccessDeniedError(
                f"registry {self.ref.host} takes uploads without TLS, at {there.netloc}",
                hint="have it name https addresses (behind a proxy: X-Forwarded-Proto), or use --plain-http if meant",
            )
        return where

    def _whole(self, server: Transport, response: requests.Response, limit: int, what: str) -> bytes:
        try:
            raw = TAKEN.read(response, MANIFEST, limit + 1, decode=True)
        except (urllib3.exceptions.HTTPError, OSError) as failure:
            raise server.unreachable(failure, f"cannot read {what}") from failure
        if len(raw) > limit:
            raise DamagedError(f"{what} is larger than {limit} bytes")
        return raw


def _pieces(response: requests.Response, at: int) -> Iterator[bytes]:
    """What follows byte `at` of a blob, out of an answer that begins there (206) or at its beginning."""
    if response.status_code == 416:
        return
    skip = 0 if response.status_code == 206 else at
    while piece := TAKEN.read(response, BLOB, _PIECE, decode=False):
        passed = min(skip, len(piece))
        skip -= passed
        if passed < len(piece):
            yield piece[passed:]


class _Body:
    """A body whose length is known before it is read."""

    def __init__(self, pieces: Iterator[bytes], size: int) -> None:
        self._pieces, self._size = pieces, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces


def _with_query(url: str, more: dict[str, str]) -> str:
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    return urlunsplit(parts._replace(query=urlencode([*query, *more.items()])))
