"""In which state an index is, for people: asked within a bounded time, and without changing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from floe.store.bounded import Bounded
from floe.store.errors import DeadlineError, UnavailableError
from floe.store.index import open_index


def index_denied(url: str, seconds: float, *, writes: bool, notes: bool = False) -> list[str]:
    """The commands that Redis' ACL does not allow; see redis/rights.py. UnavailableError. Of other kinds: none."""
    if open_index(url).url.partition(":")[0] in ("none", "sqlite"):
        return []
    late = DeadlineError(f"index does not answer within {seconds} s", hint="check the server and the network")

    def ask() -> list[str]:
        from floe.store.index.redis.address import RedisAddress  # noqa: PLC0415 - lazy: keeps --help fast
        from floe.store.index.redis.rights import denied  # noqa: PLC0415 - likewise

        return denied(RedisAddress.parse(url), writes=writes, notes=notes)

    return Bounded("index-rights", 1).call(ask, seconds, late)


def index_status(url: str | None, store_uuid: str | None, seconds: float) -> dict[str, Any]:
    """`url` without secrets, `kind` (none, sqlite, redis), `state`, and more for Redis; see redis/state.py.

    States: ok, none, "not made yet" (sqlite), unreachable (with `error`), read-only, evicting, empty, refilling (each with
    a `reason`). Waits at most `seconds`. BadInputError for an address that is none.
    """
    shown = open_index(url).url
    kind, _, path = shown.partition(":")
    if kind == "none":
        return {"url": shown, "kind": kind, "state": "none"}
    if kind == "sqlite":
        return {"url": shown, "kind": kind, "state": "ok" if Path(path).exists() else "not made yet"}
    found: dict[str, Any] = {"url": shown, "kind": "redis"}
    late = DeadlineError(f"index {shown} does not answer within {seconds} s", hint="check the server and the network")

    def ask() -> dict[str, Any]:
        from floe.store.index.redis.address import RedisAddress  # noqa: PLC0415 - lazy: keeps --help fast
        from floe.store.index.redis.state import redis_state  # noqa: PLC0415 - likewise

        return redis_state(RedisAddress.parse(url or ""), store_uuid)

    try:
        return found | Bounded("index-status", 1).call(ask, seconds, late)
    except UnavailableError as error:
        return found | {"state": "unreachable", "error": str(error), "hint": error.hint}
