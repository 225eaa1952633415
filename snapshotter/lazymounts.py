"""Keeps the trees of lazy snapshots and stub layers mounted where the overlay mounts expect them.

Concurrency: `_present` says which snapshots' binds are in place; one lock per snapshot orders the work on it, and
nothing here is called with the metastore's lock held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from floe.snapshotter.directories import Directories
from floe.snapshotter.lazylayers import LazyLayers
from floe.snapshotter.metastore import Snapshot
from floe.snapshotter.resolver import Missed
from floe.store import mounttable
from floe.store.errors import DeadlineError, FloeError, UnavailableError

log = logging.getLogger(__name__)

# A tree found healthy is not asked again for this many seconds.
HEALTH_LIFETIME = 2.0
# Seconds that mounting again may hold up the start: enough for thousands of trees, unless something hangs.
START_TIME = 60.0


def tree_of(snapshot: Snapshot) -> str | None:
    """The tree a snapshot needs mounted: its own, or the model it is a stub for."""
    return snapshot.tree or snapshot.model


class LazyMounts:
    """Binds of trees, one for each lazy snapshot and each stub layer."""

    def __init__(
        self,
        layers: LazyLayers,
        directories: Directories,
        fetch: Callable[[str], Missed | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers = layers
        self._directories = directories
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._working: dict[int, tuple[threading.Lock, int]] = {}
        self._present: dict[int, float] = {}
        self.remount_failures = 0

    def count(self) -> int:
        """How many binds are in place."""
        with self._lock:
            return len(self._present)

    def target(self, snapshot: Snapshot) -> Path:
        """Where the snapshot's tree is bound."""
        places = self._directories.places
        return places.upper(snapshot.id) if snapshot.tree else places.model(snapshot.id)

    def attach(self, snapshot: Snapshot) -> None:
        """Mount and bind the snapshot's tree, which is in the node cache. Any FloeError, nothing is left bound then.

        The use is recorded with the mounter until `detach`, even when this fails: the caller dooms the snapshot.
        """
        tree = tree_of(snapshot)
        if tree is not None:
            with self._at_work(snapshot.id):
                self._put(snapshot, tree)

    def detach(self, snapshot: Snapshot) -> None:
        """Undo `attach`, as far as it went; BusyError while the tree cannot be let go: try again later."""
        tree = tree_of(snapshot)
        if tree is None:
            return
        with self._at_work(snapshot.id):
            with self._lock:
                self._present.pop(snapshot.id, None)
            self._layers.unbind(self.target(snapshot))
            self._layers.release(tree, owner(snapshot))

    def ensure(self, chain: Iterable[Snapshot]) -> None:
        """Have every tree of `chain` in place, fetching it if need be; UnavailableError says which cannot be had."""
        for snapshot in chain:
            tree = tree_of(snapshot)
            if tree is None or self._fresh(snapshot.id):
                continue
            with self._at_work(snapshot.id):
                if not self._fresh(snapshot.id):
                    self._ensure_one(snapshot, tree)

    def remount(self, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
        """At start: put every tree back in its place from the node cache, without the network; those that failed.

        What is still mounted, since only this process was restarted, is left as it is: so is what is silent, which
        `ensure` asks again. containerd waits for this: what is not done after START_TIME counts as failed.
        """
        failed = []
        silent = False
        until = self._clock() + START_TIME
        mounted = _mount_points()
        for snapshot in snapshots:
            tree = tree_of(snapshot)
            if tree is None:
                continue
            if self._clock() > until:
                failed.append(snapshot)
                continue
            try:
                with self._at_work(snapshot.id):
                    if silent and self._is_mounted(snapshot, mounted):
                        continue
                    if self._in_place(snapshot, tree, mounted):
                        self._seen(snapshot.id)
                        continue
                    local = self._layers.fetch_local(tree)
                    if local:
                        self._put(snapshot, tree)
                problem = None if local else "its tree is not in the node cache"
            except DeadlineError as error:
                if self._is_mounted(snapshot, mounted):
                    silent = True  # nor would the others answer, and each would take as long
                    log.warning("snapshot %r and perhaps others are mounted, but silent: %s", snapshot.name, error)
                    continue
                problem = repr(error)
            except Exception as error:
                # One bad snapshot must not keep all others from being served.
                problem = repr(error)
            if problem is not None:
                failed.append(snapshot)
                self.remount_failures += 1
                log.warning("snapshot %r cannot be mounted again now: %s", snapshot.name, problem)
        return failed

    def _ensure_one(self, snapshot: Snapshot, tree: str) -> None:
        try:
            if self._in_place(snapshot, tree, _mount_points()):
                self._seen(snapshot.id)
                return
            missed = self._fetch(tree)
            if missed is None:
                self._put(snapshot, tree)
                return
            problem, hint = str(missed), missed.error.hint if missed.error else ""
        except FloeError as error:
            problem, hint = str(error), error.hint
        what = f"model tree {tree}" if snapshot.model else f"tree {tree} of layer {snapshot.chain}"
        raise UnavailableError(f"{what} (snapshot {snapshot.name!r}) cannot be mounted: {problem}", hint=hint)

    def _put(self, snapshot: Snapshot, tree: str) -> None:
        """Mount and bind; a dead mount or bind is replaced."""
        target = self.target(snapshot)
        self._layers.mount(tree, owner(snapshot))
        self._directories.mountpoint(target)
        self._layers.bind(tree, target)
        self._seen(snapshot.id)

    def _in_place(self, snapshot: Snapshot, tree: str, mounted: set[str]) -> bool:
        return self._is_mounted(snapshot, mounted) and self._layers.healthy(tree)

    def _is_mounted(self, snapshot: Snapshot, mounted: set[str]) -> bool:
        # The parent's real path only: a stat on a dead mount may never return.
        target = self.target(snapshot)
        return str(target.parent.resolve() / target.name) in mounted

    def _fresh(self, snapshot_id: int) -> bool:
        with self._lock:
            seen = self._present.get(snapshot_id)
        return seen is not None and self._clock() - seen < HEALTH_LIFETIME

    def _seen(self, snapshot_id: int) -> None:
        with self._lock:
            self._present[snapshot_id] = self._clock()

    @contextmanager
    def _at_work(self, snapshot_id: int) -> Iterator[None]:
        """One at a time for each snapshot; the lock lives as long as somebody wants it."""
        with self._lock:
            lock, users = self._working.get(snapshot_id, (threading.Lock(), 0))
            self._working[snapshot_id] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._working[snapshot_id]
                if users == 1:
                    del self._working[snapshot_id]
                else:
                    self._working[snapshot_id] = (lock, users - 1)


def _mount_points() -> set[str]:
    return {mount.target for mount in mounttable.mounts()}


def owner(snapshot: Snapshot) -> str:
    """How the mounter knows this use of a tree; durable, since ids are never used twice."""
    return f"snapshot-{snapshot.id}"
