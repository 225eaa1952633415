"""A budget of memory, shared fairly: who asks too much waits, and nobody fails.

A read is granted all it may need at once, before it fetches anything, so that two reads never wait for each other's
memory. One pack gets at most twice what is left for the others (Choudhury and Hahne's dynamic thresholds for shared
buffers): however many reads of one pack are stalled, the next pack's are served. Not thread-safe: one event loop's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

_SHARE: Final = 2  # of what is left; a pack that is alone may hold two thirds


class Lease:
    """`size` bytes of the budget, given back when as many `drop` as `hold` (one is implied) were called."""

    __slots__ = ("_budget", "_holders", "pack_id", "size")

    def __init__(self, budget: Budget, pack_id: str, size: int) -> None:
        self._budget = budget
        self._holders = 1
        self.pack_id = pack_id
        self.size = size

    def hold(self) -> None:
        """One more user of the memory."""
        self._holders += 1

    def shrink(self, size: int) -> None:
        """Give `size` bytes of it back already."""
        size = min(size, self.size)
        self.size -= size
        self._budget.give_back(self.pack_id, size)

    def drop(self) -> None:
        """One user less."""
        self._holders -= 1
        if self._holders == 0:
            self._budget.give_back(self.pack_id, self.size)


class Asked:
    """A wish for memory that may be waiting."""

    __slots__ = ("granted", "size", "withdrawn")

    def __init__(self, size: int, granted: Callable[[Lease], None]) -> None:
        self.size = size
        self.granted = granted
        self.withdrawn = False


class Budget:
    """`size` bytes. A wish for more than that counts as one for all of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self.peak = 0
        self._by_pack: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[Asked]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Wishes not granted yet."""
        return sum(1 for queue in self._waiting.values() for asked in queue if not asked.withdrawn)

    def ask(self, pack_id: str, size: int, granted: Callable[[Lease], None]) -> Asked:
        """Call `granted` with a lease as soon as there is room, perhaps at once; in order within a pack."""
        asked = Asked(min(size, self.size), granted)
        if pack_id not in self._waiting and self._fits(pack_id, asked.size):
            granted(self._take(pack_id, asked.size))
        else:
            self._waiting.setdefault(pack_id, deque()).append(asked)
        return asked

    @property
    def spare(self) -> int:
        """Bytes that work which can wait may hold altogether."""
        return self.size // 2

    def try_lease(self, pack_id: str, size: int) -> Lease | None:
        """A lease for work that can wait: only from the first half of the budget, and when nobody else waits."""
        if self._waiting or self.used + size > self.spare:
            return None
        return self._take(pack_id, size)

    def give_back(self, pack_id: str, size: int) -> None:
        """Take back what was leased for a pack, and see who can go on."""
        self.used -= size
        left = self._by_pack.pop(pack_id, 0) - size
        if left:
            self._by_pack[pack_id] = left
        self._grant()

    def _fits(self, pack_id: str, size: int) -> bool:
        held, free = self._by_pack.get(pack_id, 0), self.size - self.used
        if not self.used:
            return True
        return size <= free and (not held or held + size <= _SHARE * free)

    def _take(self, pack_id: str, size: int) -> Lease:
        self.used += size
        self.peak = max(self.peak, self.used)
        self._by_pack[pack_id] = self._by_pack.get(pack_id, 0) + size
        return Lease(self, pack_id, size)

    def _grant(self) -> None:
        progress = True
        while progress:
            progress = False
            for pack_id in list(self._waiting):
                queue = self._waiting.get(pack_id)
                while queue and queue[0].withdrawn:
                    queue.popleft()
                if not queue:
                    self._waiting.pop(pack_id, None)
                elif self._fits(pack_id, queue[0].size):
                    asked = queue.popleft()
                    self._waiting.move_to_end(pack_id)  # packs take turns
                    asked.granted(self._take(pack_id, asked.size))
                    progress = True
