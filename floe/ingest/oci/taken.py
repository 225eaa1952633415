"""What this process took from registries: answers with content, and their bytes as they came over the wire.

They are what the registries' own logs say, unless a connection breaks: a server counts what it sent, this what arrived.
Errors, redirects, tokens and what is written are not counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import requests

BLOB, MANIFEST = "blob", "manifest"
CONTENTS = (BLOB, MANIFEST)


class Taken:
    """Counters by content, one of CONTENTS. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter(dict.fromkeys(CONTENTS, 0))
        self._bytes: Counter[str] = Counter(dict.fromkeys(CONTENTS, 0))

    def answered(self, content: str) -> None:
        """A server began to answer with such content."""
        with self._lock:
            self._requests[content] += 1

    def read(self, response: requests.Response, content: str, size: int, *, decode: bool) -> bytes:
        """At most `size` bytes of the answer, counted also where reading fails behind some of them."""
        before = response.raw.tell()
        try:
            return bytes(response.raw.read(size, decode_content=decode))
        finally:
            with self._lock:
                self._bytes[content] += response.raw.tell() - before

    def counted(self) -> dict[str, Mapping[str, int]]:
        """`requests` and `bytes`, each by content."""
        with self._lock:
            return {"requests": dict(self._requests), "bytes": dict(self._bytes)}


TAKEN = Taken()
"""Of this process."""
