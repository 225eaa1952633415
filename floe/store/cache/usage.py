"""What all packs of a cache directory share."""

from __future__ import annotations

import threading
from collections.abc import Callable

from floe.store.cache.bypass import Bypass
from floe.store.cache.eviction import EMPTY


class Usage:
    """What all packs of a directory share.

    Bytes `held` (stored or about to be), `now` (recency: stores so far), failed disk `errors`, of which `trouble` is told, and
    `bypass`, which is told what reads cost.
    """

    __slots__ = ("bypass", "errors", "held", "lock", "now", "trouble")

    def __init__(self, bypass: Bypass | None = None, trouble: Callable[[], None] = lambda: None) -> None:
        self.lock = threading.Lock()
        self.bypass = bypass or Bypass()
        self.trouble = trouble
        self.held = 0
        self.now = 1
        self.errors = 0

    def add(self, count: int) -> None:
        """Change `held`, and move time on."""
        with self.lock:
            self.held += count
            self.now = min(self.now + 1, EMPTY - 1)

    def fail(self) -> None:
        """The disk refused something."""
        self.errors += 1
        self.trouble()
