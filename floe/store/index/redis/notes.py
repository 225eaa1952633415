"""Notes in Redis: a key for each, which expires by itself, and for each topic a hash of their names, so that nobody scans.

All of a topic lies in one slot. How old a note is tells what is left of its life by the server's clock, so the clocks of
nodes need not agree. A name may outlive its note: who lists a topic takes it out, if it may.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import redis
from redis.exceptions import NoPermissionError

from floe.store.index.base import Note
from floe.store.index.redis.keys import Keys

if TYPE_CHECKING:
    from floe.store.index.redis.connecting import Server

_LIFE = struct.Struct(">Q")  # milliseconds
_PER_PIPELINE = 1000  # notes: some MB of answers at the most


def put(server: Server, keys: Keys, place: tuple[str, str], data: bytes, seconds: float) -> None:
    """Write the note at `place`, a topic and a name, then its name: a name without a note is harmless, a note without a name is not found."""
    topic, name = place
    life = max(1, round(seconds * 1000))
    pipe = server.pipeline()
    pipe.set(keys.note(topic, name), _LIFE.pack(life) + data, px=life)
    pipe.hset(keys.notes(topic), name, b"")
    pipe.execute()


def read(server: Server, keys: Keys, topic: str) -> dict[str, Note]:
    """All notes of a topic, by name."""
    found: dict[str, Note] = {}
    expired = []
    names = sorted(server.client.hgetall(keys.notes(topic)))
    for start in range(0, len(names), _PER_PIPELINE):
        some = [name.decode("ascii", "replace") for name in names[start : start + _PER_PIPELINE]]
        pipe = server.pipeline()
        for name in some:
            pipe.get(keys.note(topic, name))
            pipe.pttl(keys.note(topic, name))
        answers = pipe.execute()
        for name, value, left in zip(some, answers[::2], answers[1::2], strict=True):
            if value is None or len(value) < _LIFE.size or left < 0:
                expired.append(name)
                continue
            (life,) = _LIFE.unpack_from(value)
            found[name] = Note(bytes(value[_LIFE.size :]), max(0.0, (life - left) / 1000))
    _forget(server, keys, topic, expired)
    return found


def delete(server: Server, keys: Keys, topic: str, name: str) -> None:
    """Take a note and its name away."""
    server.client.delete(keys.note(topic, name))
    server.client.hdel(keys.notes(topic), name)


def _forget(server: Server, keys: Keys, topic: str, names: list[str]) -> None:
    """Names whose notes are gone. One written again in this moment is missing until its owner writes it the next time."""
    if not names:
        return
    try:
        server.client.hdel(keys.notes(topic), *names)
    except (NoPermissionError, redis.ReadOnlyError):  # a node's user, a replica; somebody else will
        return
