"""The node cache: what every process may do with it, and what only its one writer does.

NodeCache and CacheWriter are of one directory, CacheGroup and GroupWriter of several; Cache and Writer are either.
"""

from __future__ import annotations

from floe.store.cache.group import CacheGroup
from floe.store.cache.group_writer import GroupWriter
from floe.store.cache.node_cache import NodeCache
from floe.store.cache.opening import Cache, Writer, open_cache, open_writer
from floe.store.cache.writer import CacheWriter

__all__ = ["Cache", "CacheGroup", "CacheWriter", "GroupWriter", "NodeCache", "Writer", "open_cache", "open_writer"]
