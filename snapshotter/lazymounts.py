"""Keeps the trees of lazy snapshots and stub layers mounted where the overlay mounts expect them.

Concurrency: `_present` says which snapshots' binds are in place; one lock per snapshot orders the work on it, and
nothing here is called with the metastore's lock held. Whoever puts a tree in its place asks under that lock whether the
snapshot still lives, and Cleanup takes it away under the same lock: so nothing comes back that was given back.
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
from floe.snapshotter.resolver import Resolver
from floe.snapshotter.schema import Snapshot
from floe.snapshotter.turns import Turns
from floe.store import mounttable
from floe.store.errors import DeadlineError, FloeError, NotFoundError, UnavailableError

log = logging.getLogger(__name__)

# A tree found healthy is not asked again for this many seconds.
HEALTH_LIFETIME = 2.0
# Seconds that mounting again may hold up the start: enough for thousands of trees, unless something hangs.
START_TIME = 60.0
# Seconds that one request may spend on mounting what has been fetched: enough for a hundred trees. What it got done
# stays for the next request.
MOUNT_TIME = 10.0
# How the mounter knows a snapshot's use of a tree: by its id, which is never used twice.
OWNER_PREFIX = "snapshot-"


def tree_of(snapshot: Snapshot) -> str | None:
    """The tree a snapshot needs mounted: its own, or the model it is a stub for."""
    return snapshot.tree or snapshot.model


class LazyMounts:
    """Binds of trees, one for each lazy snapshot and each stub layer.

    `lives(id)` says whether containerd knows that snapshot, `timeout` is for all fetches of one `ensure`, in seconds.
    """

    def __init__(
        self,
        layers: LazyLayers,
        directories: Directories,
        resolver: Resolver,
        *,
        lives: Callable[[int], bool],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers = layers
        self._directories = directories
        self._resolver = resolver
        self._lives = lives
        self._timeout = timeout
        self._clock = clock
        self._lock = threading.Lock()
        self._turns: Turns[int] = Turns("snapshot")
        self._present: dict[int, float] = {}
        self._unmounted: set[int] = set()
        self.remount_failures = 0

    def count(self) -> int:
        """How many binds are in place."""
        with self._lock:
            return len(self._present)

    def unmounted(self) -> frozenset[int]:
        """Ids of snapshots whose trees could not be mounted again at start, and are not since."""
        with self._lock:
            return frozenset(self._unmounted)

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
            with self._turns.take(snapshot.id):
                self._put(snapshot, tree)

    def detach(self, snapshot: Snapshot) -> None:
        """Undo `attach`, as far as it went; BusyError while the tree cannot be let go: try again later."""
        tree = tree_of(snapshot)
        if tree is None:
            return
        with self._turns.take(snapshot.id):
            with self._lock:
                self._present.pop(snapshot.id, None)
                self._unmounted.discard(snapshot.id)
            self._layers.unbind(self.target(snapshot))
            self._layers.release(tree, owner(snapshot))

    def ready(self, chain: Iterable[Snapshot]) -> bool:
        """Whether `ensure` would have nothing to do, nor to ask."""
        return all(tree_of(snapshot) is None or self._fresh(snapshot.id) for snapshot in chain)

    def ensure(self, chain: Iterable[Snapshot]) -> None:
        """Have every tree of `chain` in place, fetching what is not here, all side by side in `timeout` seconds.

        UnavailableError says which cannot be had; NotFoundError when a snapshot of them was removed meanwhile.
        """
        wanted = [
            (snapshot, tree) for snapshot in chain if (tree := tree_of(snapshot)) and not self._fresh(snapshot.id)
        ]
        if not wanted:
            return
        until = self._clock() + self._timeout
        mounted = _mount_points()
        missing = [(snapshot, tree) for snapshot, tree in wanted if not self._settled(snapshot, tree, mounted, until)]
        if not missing:
            return
        missed = self._resolver.fetch_all((tree for _, tree in missing), max(0.001, until - self._clock()))
        until = self._clock() + MOUNT_TIME
        for snapshot, tree in missing:
            if tree in missed:
                error = missed[tree].error
                raise _unavailable(snapshot, tree, str(missed[tree]), error.hint if error else "")
            if not self._put_living(snapshot, tree, until):
                raise NotFoundError(f"snapshot {snapshot.name!r} was removed meanwhile")

    def remount(self, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
        """At start: put every tree back in its place from the node cache, without the network; those that failed.

        What is still mounted, since only this process was restarted, is left as it is: so is what is silent, which
        `ensure` asks again. containerd waits for this: what is not done after START_TIME counts as failed.
        """
        failed: list[Snapshot] = []
        given_up: list[Snapshot] = []
        silent = False
        until = self._clock() + START_TIME
        mounted = _mount_points()
        for snapshot in snapshots:
            tree = tree_of(snapshot)
            if tree is None:
                continue
            if self._clock() > until:
                given_up.append(snapshot)
                continue
            try:
                with self._turns.take(snapshot.id):
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
        if given_up:
            self.remount_failures += len(given_up)
            log.warning(
                "%d snapshots, %r the first, were not mounted again within %g s: they follow while others are served",
                len(given_up),
                given_up[0].name,
                START_TIME,
            )
        with self._lock:
            self._unmounted.update(snapshot.id for snapshot in (*failed, *given_up))
        return failed + given_up

    def _settled(self, snapshot: Snapshot, tree: str, mounted: set[str], until: float) -> bool:
        """Whether the tree is in its place and answers."""
        with _told(snapshot, tree), self._turns.take(snapshot.id, until - self._clock()):
            if not self._fresh(snapshot.id):
                if not self._in_place(snapshot, tree, mounted):
                    return False
                self._seen(snapshot.id)
            return True

    def _put_living(self, snapshot: Snapshot, tree: str, until: float) -> bool:
        """Mount and bind, unless somebody did; False when the snapshot is no more."""
        with _told(snapshot, tree), self._turns.take(snapshot.id, until - self._clock()):
            if not self._lives(snapshot.id):
                return False
            if not self._fresh(snapshot.id):
                self._put(snapshot, tree)
            return True

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
            self._unmounted.discard(snapshot_id)


def _mount_points() -> set[str]:
    return {mount.target for mount in mounttable.mounts()}


def owner(snapshot: Snapshot) -> str:
    """How the mounter knows this use of a tree; durable, since ids are never used twice."""
    return f"{OWNER_PREFIX}{snapshot.id}"


def _unavailable(snapshot: Snapshot, tree: str, problem: str, hint: str) -> UnavailableError:
    what = f"model tree {tree}" if snapshot.model else f"tree {tree} of layer {snapshot.chain}"
    return UnavailableError(f"{what} (snapshot {snapshot.name!r}) cannot be mounted: {problem}", hint=hint)


@contextmanager
def _told(snapshot: Snapshot, tree: str) -> Iterator[None]:
    """Whatever goes wrong with a tree makes its snapshot unavailable."""
    try:
        yield
    except FloeError as error:
        raise _unavailable(snapshot, tree, str(error), error.hint) from error
