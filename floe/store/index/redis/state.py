"""The state of an index in Redis, for `floe status`: asked once, with reading commands only."""

from __future__ import annotations

from typing import Any

from floe.store.index.redis import chunkmap
from floe.store.index.redis import keys as layout
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.connecting import Server, connect
from floe.store.index.redis.facts import Facts
from floe.store.index.redis.faults import translate
from floe.store.index.redis.keys import MARKER, Keys

OK, READ_ONLY, EVICTING, EMPTY, REFILLING = "ok", "read-only", "evicting", "empty", "refilling"


def redis_state(address: RedisAddress, store_uuid: str | None) -> dict[str, Any]:
    """`state` and what it rests on; sizes in bytes. UnavailableError when the servers cannot be asked.

    Without `store_uuid` it stays open whether the index holds anything of the store (`packs` is missing).
    """
    server = connect(address)
    try:
        return _ask(server, address, store_uuid)
    except Exception as error:
        raise translate(error, address.shown) from error
    finally:
        server.close()


def _ask(server: Server, address: RedisAddress, store_uuid: str | None) -> dict[str, Any]:
    infos = server.infos()
    facts = Facts.of(infos)
    if facts.loading:
        raise ConnectionError("the server is loading its data")
    found: dict[str, Any] = {
        "state": OK,
        "mode": server.mode,
        "servers": len(infos),
        "version": facts.version,
        "used_memory_bytes": facts.used_memory,
        "maxmemory_bytes": facts.maxmemory,
        "maxmemory_policy": facts.policy,
        "evicted_keys": sum(facts.evicted.values()),
    }
    if facts.evicts:
        found["warning"] = facts.warning(address.shown)
    if store_uuid is not None:
        found |= _content(server, Keys(address.prefix, store_uuid))
    if facts.evicts and found["evicted_keys"]:
        found |= {
            "state": EVICTING,
            "reason": f"it dropped {found['evicted_keys']} keys, maxmemory-policy {facts.policy}",
        }
    if facts.replica:
        found |= {"state": READ_ONLY, "reason": "it is a replica"}
    elif facts.full and not facts.evicts:
        found |= {"state": READ_ONLY, "reason": "its memory is full"}
    return found


def _content(server: Server, keys: Keys) -> dict[str, Any]:
    tables = chunkmap.read_tables(server, keys)
    markers = [table.get(MARKER, b"") for table in tables]
    if not all(markers):
        part = "a part of it was lost" if any(markers) else "it holds nothing of this store"
        return {"state": EMPTY, "reason": f"{part}; the next push fills it from the bucket", "packs": 0}
    packs = len(chunkmap.sort_packs(tables, layout.generation(markers))[0].packs)
    if server.client.exists(keys.filling):
        return {"state": REFILLING, "reason": "a push fills it from the bucket", "packs": packs}
    return {"packs": packs}
