"""What warm orders keep in the node cache: pins with a name and a reason, on the cache's disk, within this node's budget.

The owner of such a pin is `warm-<tree digest>`; the pin's file says in JSON for which `name`, for what `reason`, who ordered it and
when. They outlive the agent, the pack filesystem, and the order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from floe.agent.orders import Order
from floe.store.cache import Cache
from floe.store.cache.shares import WARM_PIN
from floe.store.errors import FloeError
from floe.store.trees import LocalTree

_log = logging.getLogger(__name__)
_GIB = 1 << 30
_REASON_MAX = 512  # characters


class WarmPins:
    """The pins in `cache`, which keep `budget` bytes of it at most. For one thread at a time."""

    def __init__(self, cache: Cache, budget: int) -> None:
        self._cache = cache
        self._budget = budget

    def listed(self) -> list[dict[str, Any]]:
        """Pinned trees: `tree`, `name`, `reason`, `by`, `at`, and `bytes` of their packs. OSError."""
        packs, said = self._pinned()
        return [
            {"tree": tree, "name": "", "reason": "", "by": "", "at": "", **said[tree], "bytes": self._bytes(found)}
            for tree, found in sorted(packs.items())
        ]

    def refusal(self, trees: Iterable[LocalTree], *, pin: bool) -> str:
        """Why the budget does not allow an order for these trees, "" when it does. OSError.

        Packs count whole, each once: that is what a pin keeps. What is not pinned counts while it is fetched.
        """
        pinned = {pack for found in self._pinned()[0].values() for pack in found}
        wanted = {pack.id for tree in trees for pack in tree.packs}
        need = self._bytes(pinned | wanted)
        if need <= self._budget:
            return ""
        beside = f" beside {_gib(self._bytes(pinned))} that is pinned" if pinned else ""
        return (
            f"it needs {_gib(self._bytes(wanted - pinned))}{beside}, more than this node's warm_budget of {_gib(self._budget)}"
            f"{'; nothing was pinned' if pin else ''}"
        )

    def pin(self, tree: LocalTree, order: Order) -> None:
        """Keep a tree's packs. NotFoundError, NoSpaceError, DiskError."""
        said = {"name": order.what, "reason": order.reason[:_REASON_MAX], "by": order.by, "at": order.at}
        for pack in tree.packs:
            self._cache.pin(pack.id, WARM_PIN + tree.digest, json.dumps(said))

    def unpin(self, trees: Iterable[str], name: str, at: str) -> int:
        """Keep these trees no longer, nor any that was pinned by that name; how many were kept. Raises the disk's errors.

        `at`: when that was ordered, RFC 3339. What was ordered pinned after it stays: an agent that starts meets old orders again.
        """
        packs, said = self._pinned()
        wanted = {*trees, *(tree for tree, words in said.items() if words.get("name") == name)}
        gone = {tree for tree in wanted & packs.keys() if not at or said[tree].get("at", "") <= at}
        for tree in gone:
            for pack_id in packs[tree]:
                self._cache.unpin(pack_id, WARM_PIN + tree)
        return len(gone)

    def _pinned(self) -> tuple[dict[str, set[str]], dict[str, dict[str, Any]]]:
        """By tree, the packs that are pinned for it, and what was said."""
        packs: dict[str, set[str]] = {}
        said: dict[str, dict[str, Any]] = {}
        for pack_id in self._cache.pack_ids():
            for owner in self._cache.pins(pack_id):
                if not owner.startswith(WARM_PIN):
                    continue
                tree = owner.removeprefix(WARM_PIN)
                packs.setdefault(tree, set()).add(pack_id)
                if not said.get(tree):
                    said[tree] = _said(self._cache.pin_reason(pack_id, owner))
        return packs, said

    def _bytes(self, packs: Iterable[str]) -> int:
        total = 0
        for pack_id in packs:
            with suppress(FloeError):
                total += self._cache.content_size(pack_id) or 0
        return total


def _said(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {key: str(value[key]) for key in ("name", "reason", "by", "at") if key in value}


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
