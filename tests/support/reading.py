"""Waiting for a pack reader's answers."""

from __future__ import annotations

import threading

from floe.store.errors import FloeError


class Answer:
    """`done` for a submit: keeps the answer, and fails the test when a second one comes."""

    def __init__(self):
        self._event = threading.Event()
        self.value = None
        self.calls = 0
        self.ticket = None

    def __call__(self, value):
        self.calls += 1
        self.value = value if isinstance(value, FloeError) else b"".join(bytes(piece) for piece in value)
        self._event.set()

    def wait(self, timeout=20.0):
        assert self._event.wait(timeout), "no answer came"
        assert self.calls == 1
        return self.value

    @property
    def came(self):
        return self._event.is_set()


def submit(reader, pack_id, offset, length):
    answer = Answer()
    answer.ticket = reader.submit(pack_id, offset, length, answer)
    return answer


def read(reader, pack_id, offset, length):
    """As the worker reads: from memory or the cache, else from the store. Bytes, or the error raised."""
    pieces = reader.on_hand(pack_id, offset, length)
    if pieces is not None:
        return b"".join(pieces)
    buffer = bytearray(length)
    if reader.read_cached_into(pack_id, offset, memoryview(buffer)):
        return bytes(buffer)
    value = submit(reader, pack_id, offset, length).wait()
    if isinstance(value, FloeError):
        raise value
    return value
