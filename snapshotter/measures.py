"""What snapshots take on this node's disk, measured no more often than the measuring is worth."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from cachetools import LRUCache

from floe.snapshotter.directories import Directories
from floe.snapshotter.lazylayers import LazyLayers, Usage
from floe.snapshotter.lazymounts import tree_of
from floe.snapshotter.metastore import Metastore
from floe.snapshotter.schema import Kind, Snapshot

# How many times longer than it took a measurement of disk usage stands.
USAGE_REST = 10
_USAGE_KEPT = 4096


class Measures:
    """Disk usage of snapshots, without their parents. Thread-safe."""

    def __init__(self, meta: Metastore, directories: Directories, layers: LazyLayers) -> None:
        self._meta = meta
        self._directories = directories
        self._layers = layers
        self._lock = threading.Lock()
        self._usage: OrderedDict[int, tuple[float, Usage]] = OrderedDict()
        self._packs: LRUCache[str, frozenset[str]] = LRUCache(_USAGE_KEPT)

    def usage(self, snapshot: Snapshot) -> Usage:
        """What `snapshot` takes. A view takes nothing.

        A committed directory no longer changes: it is measured when first asked for, since Commit must be quick.
        """
        if snapshot.kind is Kind.VIEW:
            return Usage(0, 0)
        if snapshot.kind is Kind.ACTIVE or tree_of(snapshot) is not None:
            return self._changing(snapshot)
        if snapshot.size is None or snapshot.inodes is None:
            measured = self._own(snapshot)
            self._meta.set_usage(snapshot.id, measured.size, measured.inodes)
            return measured
        return Usage(snapshot.size, snapshot.inodes)

    def _changing(self, snapshot: Snapshot) -> Usage:
        """Usage of what grows: an active snapshot's files, a tree's packs in the node cache.

        containerd asks every ten seconds. A measurement stands for ten times as long as it took, so that a container
        with a million files costs a tenth of a processor and not all of it.
        """
        started = time.monotonic()
        with self._lock:
            until, measured = self._usage.get(snapshot.id, (0.0, Usage(0, 0)))
        if started < until:
            return measured
        measured = Usage(0, 0)
        tree = None if snapshot.kind is Kind.ACTIVE else tree_of(snapshot)
        if tree is not None:
            measured = self._cached(snapshot, tree)
        if snapshot.tree is None:
            own = self._own(snapshot)
            measured = Usage(measured.size + own.size, measured.inodes + own.inodes)
        ended = time.monotonic()
        with self._lock:
            self._usage[snapshot.id] = (ended + USAGE_REST * (ended - started), measured)
            while len(self._usage) > _USAGE_KEPT:
                self._usage.popitem(last=False)
        return measured

    def _own(self, snapshot: Snapshot) -> Usage:
        return self._directories.usage(self._directories.places.upper(snapshot.id))

    def _cached(self, snapshot: Snapshot, tree: str) -> Usage:
        """What the node cache holds of a tree, each pack counted once on this node: for the oldest snapshot it is of."""
        older = {
            needed
            for other in self._meta.walk()
            if other.id < snapshot.id and other.kind is Kind.COMMITTED and (needed := tree_of(other)) is not None
        }
        if tree in older:
            return Usage(0, 0)
        counted = frozenset[str]().union(*(self._packs_of(other) for other in older))
        return self._layers.usage(tree, without=counted)

    def _packs_of(self, tree: str) -> frozenset[str]:
        with self._lock:
            packs = self._packs.get(tree)
        if packs is None:
            packs = self._layers.packs(tree)
            if packs is None:
                return frozenset()  # not here now, so nothing of it is counted
            with self._lock:
                self._packs[tree] = packs
        return packs
