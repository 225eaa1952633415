"""Plain HTTP requests to Google Cloud Storage, for what obstore does not do: generations in lists, parts, buckets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter

from floe.store.errors import FloeError, UnavailableError
from floe.store.objects.answers import Answer, from_http
from floe.store.objects.bucket import BucketStore
from floe.store.objects.credentials import ATTEMPTS
from floe.store.objects.gcs_address import GCSAddress
from floe.store.objects.gcs_credentials import TokenProvider
from floe.store.objects.multipart import AT_ONCE, Body

_TIMEOUT = (5.0, 30.0)  # seconds to connect, and of silence


class GCSClient:
    """Requests with the token, endpoint and CA of a store. Thread-safe.

    A request that is refused for its token is made again when there is another one by then.
    """

    def __init__(self, store: BucketStore, address: GCSAddress, tokens: TokenProvider) -> None:
        self._store = store
        self._address = address
        self._tokens = tokens
        self._session = requests.Session()
        self._session.trust_env = address.endpoint is None  # a proxy is not for emulators, nor is ~/.netrc for tokens
        if address.ca is not None:
            self._session.verify = str(address.ca)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=AT_ONCE))

    def json(self, method: str, path: str, key: str, **arguments: Any) -> dict[str, Any]:
        """The object that the JSON API answers; `path` below `/storage/v1/`, FloeErrors speak of `key`."""
        found = self.send(method, f"{self._address.base}/storage/v1/{path}", key, **arguments).json()
        return found if isinstance(found, dict) else {}

    def xml(self, method: str, key: str, full_key: str | None, **arguments: Any) -> requests.Response:
        """What the XML API answers about an object (or the bucket, `full_key` None); FloeErrors speak of `key`."""
        return self.send(method, self._url(full_key), key, **arguments)

    def located(self, full_key: str) -> tuple[str, dict[str, str]]:
        """Where the XML API has an object, and the headers that open it."""
        return self._url(full_key), self._authorization(self._tokens.current())

    def _url(self, full_key: str | None) -> str:
        path = "" if full_key is None else f"/{quote(full_key, safe='')}"
        return f"{self._address.base}/{quote(self._address.bucket, safe='')}{path}"

    def _authorization(self, token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    def full_key(self, key: str) -> str:
        """A key of the store as the bucket has it."""
        return f"{self._address.prefix}/{key}" if self._address.prefix else key

    def send(
        self,
        method: str,
        url: str,
        key: str,
        *,
        headers: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> requests.Response:
        """One request and its good answer."""
        writing = method not in ("GET", "HEAD")
        for attempt in range(ATTEMPTS):
            token = self._tokens.current()
            given = {**(headers or {}), **self._authorization(token)}
            if isinstance(body := arguments.get("data"), Body):
                body.seek(0)  # a refused attempt has read it
            try:
                answer = self._session.request(method, url, headers=given, timeout=_TIMEOUT, **arguments)
            except requests.RequestException as error:
                raise self._unreachable(error, key, writing=writing) from None
            if answer.ok:
                return answer
            found = _answer(answer)
            if attempt == ATTEMPTS - 1 or not found.about_credentials or not self._tokens.renew(token):
                raise self._store.refusal(found, key, writing=writing)
        raise AssertionError

    def close(self) -> None:
        """Release connections."""
        self._session.close()

    def _unreachable(self, error: requests.RequestException, key: str, *, writing: bool) -> FloeError:
        inner: BaseException | None = error
        while inner is not None:  # a body that refuses to be read any further says why
            if isinstance(inner, FloeError):
                return inner
            inner = inner.__cause__ or inner.__context__
        reason = (
            "no answer in time" if isinstance(error, requests.Timeout) else "cannot connect, or the answer broke off"
        )
        verb = "write" if writing else "read"
        server = self._store.place.server
        return UnavailableError(
            f"cannot {verb} {key} in {self._store.url}: {reason}", hint=f"check that {server} can be reached from here"
        )


def _answer(response: requests.Response) -> Answer:
    """What a refusal says, in XML or JSON."""
    text = response.text
    if text.lstrip().startswith("{"):
        try:
            problem = json.loads(text)["error"]
            message = str(problem["message"] if isinstance(problem, dict) else problem)
        except (ValueError, KeyError):
            message = ""
        missing = response.status_code == 404 and "bucket" in message.lower()
        return Answer(
            response.status_code,
            "NoSuchBucket" if missing else "",
            " ".join(message.split()).rstrip(".") or f"HTTP status {response.status_code}",
        )
    return from_http(response.status_code, text)
