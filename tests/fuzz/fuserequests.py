"""Requests as no kernel would send them, to a session without one: each is answered once, and briefly."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from floe.fuse import protocol as p
from floe.fuse import session as module
from floe.fuse.known import KnownPacks
from floe.fuse.lead import Lead
from floe.fuse.session import Session
from floe.fuse.slots import SLOT
from floe.store.errors import UnavailableError

PACK, OTHER = "ab" * 32, "cd" * 32
SIZE = 3 << 20
_UNANSWERED = (p.FORGET, p.BATCH_FORGET)


class _Slots:
    """Memory of two requests, and nothing of the rest."""

    initialized = False
    left: Sequence[int] = ()

    def release(self, slot: int) -> None: ...
    def set_initialized(self) -> None: ...
    def count_replay(self) -> None: ...
    def remembered(self) -> list[tuple[int, int, int, int]]:
        return []


class _Ticket:
    def cancel(self) -> None: ...


class _Reader:
    """One pack of zeros, cached in its first half; of the rest every second read fails."""

    def lookup(self, pack_id: str) -> int | None:
        return SIZE if pack_id in (PACK, OTHER) else None

    def on_hand(self, _pack: str, _offset: int, _length: int, *, told: bool) -> None:
        return None

    def answered(self, _pack: str, _offset: int, _length: int) -> None: ...

    def read_cached_into(self, _pack: str, offset: int, buffer: memoryview, *, wait: bool = True, told: bool) -> bool:
        assert 0 <= offset <= offset + len(buffer) <= SIZE
        buffer[:] = bytes(len(buffer))
        return offset + len(buffer) <= SIZE // 2

    def submit(self, _pack: str, offset: int, length: int, done: Any) -> _Ticket:
        assert 0 < length <= p.MAX_READ
        done(UnavailableError("not now") if offset % 2 else [bytes(length)])
        return _Ticket()


class _Recorded(Session):
    """Keeps the answers: (unique, bytes, errno)."""

    def _write(self, unique: int, parts: list[Any]) -> None:
        whole = b"".join(bytes(part) for part in parts)
        length, error, named = p.OUT_HEADER.unpack_from(whole)
        assert length == len(whole) <= p.OUT_BYTES + p.MAX_READ
        assert named == unique
        assert error <= 0
        assert -error in errno.errorcode or not error
        self.answers.append((unique, length, -error))


@cache
def _session() -> _Recorded:
    module._EINTR_RETRY = 0.0
    reader, _ = os.pipe()
    made = _Recorded(reader, _Slots(), KnownPacks(Path(tempfile.mkdtemp(prefix="floe-fuzz-"))), _Reader())
    made.answers = []
    made._known.add(PACK, SIZE)
    return made


def check(data: bytes) -> None:
    """Any number of requests, each after two bytes that say how long it is; a slot holds what an earlier one left."""
    session = _session()
    session._reads.clear()
    slot, buffer = bytearray(SLOT), memoryview(bytearray(p.OUT_BYTES + p.MAX_READ))
    at = 0
    while at + 2 < len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        request = data[at + 2 : at + 2 + length]
        at += 2 + len(request)
        if len(request) < p.IN_BYTES:
            continue  # the kernel cannot send less
        slot[: len(request)] = request
        _, opcode, unique, *_ = p.IN_HEADER.unpack_from(request)
        session.answers.clear()
        held = unique in session._reads
        session._handle(0, memoryview(slot), buffer, Lead(session._leading))
        expected = 0 if opcode in _UNANSWERED else 1
        assert len(session.answers) == expected or held, (opcode, session.answers)
    assert session._known.get(p.ROOT_NODE) is None


def _request(opcode: int, unique: int, node: int, body: bytes = b"") -> bytes:
    raw = p.IN_HEADER.pack(p.IN_BYTES + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body
    return struct.pack("<H", len(raw)) + raw


def seeds() -> Iterable[bytes]:
    """What a kernel says."""
    node = p.node_id(PACK)
    read = p.READ_IN.pack(0, 4096, 8192, 0, 0, 0, 0)
    yield _request(p.INIT, 2, 0, struct.pack("<4I", 7, 38, 1 << 20, p.WANTED) + bytes(48))
    yield _request(p.LOOKUP, 2, 1, PACK.encode() + b"\0") + _request(p.OPEN, 4, node) + _request(p.READ, 6, node, read)
    yield _request(p.READ, 6, node, p.READ_IN.pack(0, SIZE - 4097, 8192, 0, 0, 0, 0))
    yield _request(p.READ, 6, node, read) + _request(p.INTERRUPT, 7, 0, struct.pack("<Q", 6))
    yield _request(p.OPENDIR, 2, 1) + _request(p.READDIR, 4, 1, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    yield _request(p.GETATTR, 2, 1) + _request(p.STATFS, 4, 1) + _request(p.FORGET, 6, node, bytes(8))
    yield _request(p.RELEASE, 2, node) + _request(p.DESTROY, 4, 1) + _request(99, 6, 1)
