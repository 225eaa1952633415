"""Which commands of an index the user of its address may not give: each is given once, on a key that nobody else uses."""

from __future__ import annotations

import secrets
from typing import Any

import redis

from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.connecting import connect
from floe.store.index.redis.faults import translate
from floe.store.index.redis.keys import Keys

# What nodes do, and what who publishes and collects does besides; install/identity/redis-users.acl allows exactly these.
_READS = ("GET", "HEXISTS", "HGETALL", "EXISTS")
_EXPIRES = 60  # seconds, for a key that could not be deleted


def denied(address: RedisAddress, *, writes: bool) -> list[str]:
    """Names of the commands, empty when all are allowed. With `writes` a key is written, and deleted again.

    UnavailableError when the servers cannot be asked, or refuse for another reason.
    """
    key = Keys(address.prefix, f"rights {secrets.token_hex(8)}").ref("tried")
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
    found = []
    server = connect(address)
    try:
        if writes and (refused := _irremovable(server.client, key)):
            found += refused
            commands = [command for command in commands if command[0] not in ("SET", "HSET", "HSETNX", *refused)]
        for command in commands:
            try:
                server.client.execute_command(*command)
            except redis.exceptions.NoPermissionError:
                found.append(command[0])
    except Exception as error:
        raise translate(error, address.shown) from error
    finally:
        server.close()
    return found


def _irremovable(client: Any, key: str) -> list[str]:
    """What of DEL and HDEL is refused: tried on a key that is not there, before anything is written that they must remove."""
    refused = []
    for command in (("DEL", key), ("HDEL", key, "f")):
        try:
            client.execute_command(*command)
        except redis.exceptions.NoPermissionError:
            refused.append(command[0])
    return refused
