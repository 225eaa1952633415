"""Pins that models' policies set: on the cache's disk, in force also while the model is not mounted and no worker runs.

The owner of such a pin names model and tree: `policy-<name>@<tree digest>`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from floe.store.cache import Cache
from floe.store.cache.shares import POLICY_PIN
from floe.store.errors import FloeError
from floe.store.policy import Policy

_log = logging.getLogger(__name__)
_GIB = 1 << 30


class PolicyPins:
    """The pins in `cache`, `policy_of` tells the policy of a model. For one thread at a time, but for `holds`."""

    def __init__(self, cache: Cache, policy_of: Callable[[str], Policy | None]) -> None:
        self._cache = cache
        self._policy_of = policy_of
        self._pins: dict[tuple[str, str], set[str]] = {}  # (model's name, tree) -> packs; entries are replaced
        try:
            for pack_id in cache.pack_ids():
                for owner in cache.pins(pack_id):
                    name, at, tree = owner.removeprefix(POLICY_PIN).rpartition("@")
                    if owner.startswith(POLICY_PIN) and at:
                        self._pins.setdefault((name, tree), set()).add(pack_id)
        except OSError as error:  # then some are kept that no policy asks for
            _log.warning("pins in the cache cannot be read: %s", error)

    def holds(self, tree: str) -> bool:
        """Whether a tree's packs are pinned."""
        return any(tree == pinned for _, pinned in list(self._pins))

    def keep_wanted(self) -> None:
        """Take the pins away that no policy asks for any more."""
        for name, tree in list(self._pins):
            policy = self._policy_of(name)
            if policy is None or not policy.pin:
                self._unpin(name, tree)

    def pin(self, name: str, trees: Mapping[str, Sequence[str]]) -> str:
        """Pin the packs of a model's mounted `trees`, in place of its trees before; why not, when that is refused.

        Refused is what would leave the cache less than nothing. Raises the disk's errors.
        """
        for known in [tree for other, tree in self._pins if other == name and tree not in trees]:
            self._unpin(name, known)
        missing = {tree: packs for tree, packs in trees.items() if not self._are_pinned(name, tree, packs)}
        if not missing:
            return ""
        wanted = {pack_id for packs in trees.values() for pack_id in packs}
        others = sum(self._size(other) for other in {other for other, _ in self._pins} - {name})
        need = self._bound(name, wanted)
        if self._cache.size is not None and need + others > self._cache.size:
            besides = f" beside {others / _GIB:.1f} GiB of other pinned models" if others else ""
            return (
                f"its policy pins {need / _GIB:.1f} GiB, which the cache of {self._cache.size / _GIB:.1f} GiB cannot keep"
                f"{besides}; nothing of it is pinned: raise cache_size, or give it a share"
            )
        for tree, packs in missing.items():
            for pack_id in packs:
                self._cache.pin(pack_id, _owner(name, tree))
            self._pins[name, tree] = set(packs)
        return ""

    def _are_pinned(self, name: str, tree: str, packs: Sequence[str]) -> bool:
        """Asked of the disk, too: a pack that lay in a directory that is left out got a new place, without its pins."""
        if set(packs) != self._pins.get((name, tree), set()):
            return False
        return all(_owner(name, tree) in self._cache.pins(pack_id) for pack_id in packs)

    def _unpin(self, name: str, tree: str) -> None:
        packs = self._pins.pop((name, tree), set())
        _log.info("tree %s of model %s is no longer pinned", tree, name)
        for pack_id in packs:
            with suppress(FloeError):
                self._cache.unpin(pack_id, _owner(name, tree))

    def _size(self, name: str) -> int:
        packs = {pack_id for (other, _), found in self._pins.items() if other == name for pack_id in found}
        return self._bound(name, packs)

    def _bound(self, name: str, packs: set[str]) -> int:
        """Bytes that these packs of a model take at most."""
        policy = self._policy_of(name)
        size = sum(self._cache.content_size(pack_id) or 0 for pack_id in packs)
        return size if policy is None or policy.share is None else min(size, policy.share)


def _owner(name: str, tree: str) -> str:
    return f"{POLICY_PIN}{name}@{tree}"
