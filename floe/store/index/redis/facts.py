"""What INFO says about the servers: whether they evict, are full or read-only. Nothing else is ever asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Of all primaries together. `evicted`: keys evicted so far, by the run id of the server; memory in bytes."""

    policy: str
    evicted: Mapping[str, int]
    used_memory: int
    maxmemory: int
    replica: bool
    full: bool
    loading: bool
    version: str

    @classmethod
    def of(cls, infos: Iterable[Mapping[str, Any]]) -> Facts:
        """Out of INFO's answers; what a managed service leaves out counts as harmless."""
        found = list(infos)
        policies = {str(info.get("maxmemory_policy", "noeviction")) for info in found}
        memory = [(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))) for info in found]
        return cls(
            policy=", ".join(sorted(policies - {"noeviction"})) or "noeviction",
            evicted={str(info.get("run_id", "")): int(info.get("evicted_keys", 0)) for info in found},
            used_memory=sum(used for used, _ in memory),
            maxmemory=sum(limit for _, limit in memory),
            replica=any(info.get("role") == "slave" for info in found),
            full=any(limit and used >= limit for used, limit in memory),
            loading=any(int(info.get("loading", 0)) for info in found),
            version=str(found[0].get("valkey_version") or found[0].get("redis_version", "unknown")),
        )

    @property
    def evicts(self) -> bool:
        """Whether a server drops keys when its memory is full."""
        return self.policy != "noeviction"

    def evicted_since(self, recorded: Mapping[str, int]) -> bool:
        """Whether a server has evicted keys that were not counted in `recorded`, an earlier `evicted`."""
        return any(count > recorded.get(run_id, 0) for run_id, count in self.evicted.items())

    def warning(self, url: str) -> str | None:
        """What an administrator should hear; None when all is well."""
        if not self.evicts:
            return None
        return (
            f"index {url} drops keys when its memory is full (maxmemory-policy {self.policy});"
            " set it to noeviction, or content will be looked up in vain and stored again"
        )
