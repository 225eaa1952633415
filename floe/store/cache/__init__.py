"""The node cache: what every process may do with it (NodeCache), and what only its one writer does (CacheWriter)."""

from __future__ import annotations

from floe.store.cache.node_cache import NodeCache
from floe.store.cache.writer import CacheWriter

__all__ = ["CacheWriter", "NodeCache"]
