"""Which commands of an index the user of its address may not give: each is given once, on a key that nobody else uses."""

from __future__ import annotations

import secrets
from typing import Any

import redis

from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.connecting import connect
from floe.store.index.redis.faults import translate
from floe.store.index.redis.keys import Keys
from floe.store.index.topics import OF_NODES

# What nodes do, and what who publishes and collects does besides; install/identity/redis-users.acl allows exactly these.
_READS = ("GET", "HEXISTS", "HGETALL", "EXISTS", "PTTL")
_EXPIRES = 60  # seconds, for a key that could not be deleted
_NOTE_EXPIRES = 2000  # ms, for a note, which is not deleted: long enough for the command after it


def denied(address: RedisAddress, *, writes: bool, notes: bool = False) -> list[str]:
    """Names of the commands, empty when all are allowed. With `writes` a key is written, and deleted again.

    With `notes` those with which a node's agent says how it is: notes are written that expire soon.

    UnavailableError when the servers cannot be asked, or refuse for another reason.
    """
    keys = Keys(address.prefix, f"rights {secrets.token_hex(8)}")
    key = keys.ref("tried")
    commands: list[tuple[str, ...]] = [(name, key, *(("f",) if name == "HEXISTS" else ())) for name in _READS]
    if writes:
        commands += [
            ("SET", key, "", "EX", str(_EXPIRES)),
            ("DEL", key),
            ("HSETNX", key, "f", "1"),
            ("HSET", key, "f", "1"),
            ("HGET", key, "f"),
            ("HDEL", key, "f"),
            ("EVAL", "return 0", "1", key),
        ]
    found: list[str] = []
    server = connect(address)
    try:
        if writes and (refused := _irremovable(server.client, key)):
            found += refused
            commands = [command for command in commands if command[0] not in ("SET", "HSET", "HSETNX", *refused)]
        found += [command[0] for command in commands if _is_denied(server.client, command)]
        for topic in OF_NODES if notes else ():
            note = keys.note(topic, "tried")
            # A string, which expires, so that nothing has to be deleted. A hash of that name would stay: only where there is one,
            # and then HSET is refused for its type, if for nothing else.
            if _is_denied(server.client, ("SET", note, "", "PX", str(_NOTE_EXPIRES))):
                found.append("SET")
            elif _is_denied(server.client, ("HSET", note, "f", "")):
                found.append("HSET")
    except Exception as error:
        raise translate(error, address.shown) from error
    finally:
        server.close()
    return list(dict.fromkeys(found))


def _is_denied(client: Any, command: tuple[str, ...]) -> bool:
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
    return False


def _irremovable(client: Any, key: str) -> list[str]:
    """What of DEL and HDEL is refused: tried on a key that is not there, before anything is written that they must remove."""
    return [command[0] for command in (("DEL", key), ("HDEL", key, "f")) if _is_denied(client, command)]
