"""Makes room in one directory of the cache, within its size, its disk and the shares of models. Part of its writer."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from floe.store.cache.cached_pack import CachedPack
from floe.store.cache.eviction import EXTENT, batch, oldest_first, shortage
from floe.store.cache.node_cache import NodeCache
from floe.store.cache.shares import Room, Share
from floe.store.cache.usage import Usage
from floe.store.errors import FloeError

if TYPE_CHECKING:
    from floe.store.cache.writer import Group

_PAUSE = 0.2  # seconds without storing or evicting after there was nothing to evict


class Evictor:
    """Takes away content of `packs`, those of `cache`, when there is no room. Thread-safe.

    `failed` is told of a pack, the error and what could not be done; `evicted` of bytes that went.
    """

    def __init__(
        self,
        cache: NodeCache,
        packs: Mapping[str, CachedPack],
        usage: Usage,
        group: Group,
        *,
        boot_id: str,
        failed: Callable[[str, OSError | FloeError, str], None],
        evicted: Callable[[int], None],
    ) -> None:
        self._cache = cache
        self._packs = packs
        self._usage = usage
        self._group = group
        self._boot_id = boot_id
        self._failed = failed
        self._evicted = evicted
        self._room = threading.Lock()  # who evicts for what is to be stored
        self._idle_until = 0.0

    def room(self, pack_id: str = "") -> Room:
        """What can be stored of a pack, or of one without a share, before something has to go; the tightest of all bounds."""
        free = [] if self._cache.size is None else [self._cache.size - self._usage.held]
        if self._cache.min_free:
            with suppress(OSError):
                free.append(self._free_on_disk() - self._cache.min_free)
        of_all = Room(min(free, default=1 << 62), self._cache.size)
        of_shares = (Room(s.size - self._held(s), s.size, s.name) for s in self._group.shares.by_pack.get(pack_id, ()))
        return min((of_all, *of_shares), key=lambda room: room.free)

    def _held(self, share: Share) -> int:
        packs = self._group.packs
        return sum(pack.bits.held() for pack_id in share.packs if (pack := packs.get(pack_id)) is not None)

    def _fits_shares(self, pack_id: str, need: int, *, evict: bool) -> bool:
        """Whether `need` bytes more of a pack stay within its model's share, of which the oldest goes for that."""
        for share in self._group.shares.by_pack.get(pack_id, ()):
            over = self._held(share) + need - share.size
            if over > 0 and evict:
                self.evict(batch(over, share.size), share)
                over = self._held(share) + need - share.size
                if over > 0:
                    self._group.evict_elsewhere(over, share)
                    over = self._held(share) + need - share.size
            if over > 0:
                return False
        return True

    def reserve(self, pack_id: str, need: int, *, full: bool, evict: bool) -> bool:
        """Count `need` bytes as held, after evicting what that takes, if `evict`. `full`: the disk just said so."""
        with self._room:
            if not self._fits_shares(pack_id, need, evict=evict):
                return False
            short = self._short(need)
            if full:
                short = max(short, need)
            if short > 0:
                if not evict or time.monotonic() < self._idle_until:
                    return False
                self.evict(batch(short, self._cache.size))
                if self._short(need) > 0:
                    self._idle_until = time.monotonic() + _PAUSE
                    return False
            self._usage.add(need)
        return True

    def _free_on_disk(self) -> int:
        status = os.statvfs(self._cache.packs)
        return status.f_bavail * status.f_frsize

    def _short(self, need: int) -> int:
        free = None
        if self._cache.min_free:
            try:
                free = self._free_on_disk()
            except OSError:
                return 0  # then writing fails too, and says why
        return shortage(need, self._usage.held, self._cache.size, free, self._cache.min_free)

    def evict(self, target: int, among: Share | None = None) -> int:
        """Take away at least `target` bytes of what was not used for longest, if there is so much; what went.

        `among`: only from the packs of one model, whose own policy may pin them against all others.
        """
        packs = [pack for pack in self._packs.values() if among is None or pack.id in among.packs]
        passed = _none if among is None else among.owns
        pinned: dict[int, bool] = {}
        chosen: dict[int, list[int]] = {}
        freed = planned = 0
        for position, extent in oldest_first([p.recency for p in packs]):
            pack = packs[position]
            if position not in pinned:
                pinned[position] = self._is_pinned(pack.id, passed)
            if pinned[position]:
                continue
            per_extent = EXTENT // pack.bits.frame_size
            frames = pack.bits.present(extent * per_extent, (extent + 1) * per_extent)
            chosen.setdefault(position, []).extend(frames)
            planned += sum(map(pack.bits.content_length, frames))
            if planned >= target - freed:
                freed += sum(self.drop(packs[at], going, passed) for at, going in chosen.items())
                chosen, planned = {}, 0
                if freed >= target:
                    break
        freed += sum(self.drop(packs[at], going, passed) for at, going in chosen.items())
        self._evicted(freed)
        return freed

    def _is_pinned(self, pack_id: str, passed: Callable[[str], bool]) -> bool:
        """Whether there are pins other than those `passed` over."""
        try:
            return not all(map(passed, self._cache.pins(pack_id)))
        except OSError as error:  # such as too many open files: nobody knows, so nothing goes
            self._failed(pack_id, error, "write")
            return True

    def drop(self, pack: CachedPack, frames: list[int], passed: Callable[[str], bool], *, wait: bool = False) -> int:
        """Take away frames of a pack; the bytes that went: none while it has pins other than those `passed` over.

        With `wait` off also none while somebody pins or completes it.
        """
        try:
            with self._cache.locked(pack.id, wait=wait):
                if self._is_pinned(pack.id, passed):
                    return 0
                return pack.drop(frames, self._boot_id)
        except BlockingIOError:
            return 0  # somebody pins or completes it right now
        except (OSError, FloeError) as error:
            self._failed(pack.id, error, "evict from")
            return 0


def _none(_pin: str) -> bool:
    return False
