"""Bounds on what groups of packs take of the cache, below the bound of all of it.

Belongs to the writer. `by_pack` is replaced and never changed, so that whoever stores looks it up without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

POLICY_PIN = "policy-"  # what the names of pins that a model's policy set begin with
WARM_PIN = "warm-"  # the same of pins that a warm order set: a tree's digest follows
_RESERVE_SHARE, _RESERVE_MAX = 32, 128 << 20
_PLENTY_SHARE, _PLENTY_MAX = 16, 4 << 30


class Share(NamedTuple):
    """The `packs` of the model `name` may hold `size` bytes of content together."""

    name: str
    size: int
    packs: frozenset[str]

    def owns(self, pin: str) -> bool:
        """Whether this model's policy set a pin, and not another's or a mount."""
        return is_policy(pin) and pin.removeprefix(POLICY_PIN).rpartition("@")[0] == self.name


def is_policy(pin: str) -> bool:
    """Whether the owner of a pin is a model's policy, `policy-<name>@<tree digest>`, and not a mount or an order."""
    return pin.startswith(POLICY_PIN)


def is_no_mount(pin: str) -> bool:
    """Whether a pin only keeps content in its place: it may be replaced if it is damaged, for no mount reads past the worker."""
    return pin.startswith((POLICY_PIN, WARM_PIN))


class Room(NamedTuple):
    """`free` bytes can be stored before something of the cache, or of the share called `share`, has to go.

    `size`: bytes of the whole, None when only the disk bounds it.
    """

    free: int
    size: int | None
    share: str = ""

    @property
    def reserve(self) -> int:
        """Bytes that work nobody waits for leaves free: more than eviction makes room for at a time.

        Else it would fill again and again what readers have just made free.
        """
        return _RESERVE_MAX if self.size is None else min(self.size // _RESERVE_SHARE, _RESERVE_MAX)

    @property
    def is_plenty(self) -> bool:
        """Whether such work may begin again after it stopped for want of room."""
        return self.free >= (_PLENTY_MAX if self.size is None else min(self.size // _PLENTY_SHARE, _PLENTY_MAX))


class Shares:
    """The shares of a cache. Thread-safe."""

    def __init__(self) -> None:
        self.by_pack: Mapping[str, tuple[Share, ...]] = {}
        self._shares: dict[str, Share] = {}
        self._lock = threading.Lock()

    def set(self, name: str, size: int | None, packs: Iterable[str]) -> None:
        """Bound what `packs` hold for the model `name`; None: no longer."""
        with self._lock:
            self._shares.pop(name, None)
            if size is not None:
                self._shares[name] = Share(name, size, frozenset(packs))
            found: dict[str, tuple[Share, ...]] = {}
            for share in self._shares.values():
                for pack_id in share.packs:
                    found[pack_id] = (*found.get(pack_id, ()), share)
            self.by_pack = found
