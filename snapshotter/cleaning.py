"""Gives back what nobody needs any more: removed snapshots, directories left by a crash, uses without a snapshot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from floe.snapshotter.directories import Directories
from floe.snapshotter.idmaps import Clones
from floe.snapshotter.lazylayers import LazyLayers
from floe.snapshotter.lazymounts import OWNER_PREFIX, LazyMounts
from floe.snapshotter.metastore import Metastore
from floe.snapshotter.schema import Snapshot
from floe.store.errors import BusyError, CancelledError, FloeError

log = logging.getLogger(__name__)


class Cleaner:
    """One clean-up at a time. `count(event)` counts for the metrics; once `stop` is set clean-ups end early."""

    def __init__(
        self,
        meta: Metastore,
        directories: Directories,
        layers: LazyLayers,
        lazy: LazyMounts,
        clones: Clones,
        *,
        count: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._meta = meta
        self._directories = directories
        self._places = directories.places
        self._layers = layers
        self._lazy = lazy
        self._clones = clones
        self._count = count
        self._stop = stop
        self._cleaning = threading.Lock()

    def recover(self) -> None:
        """At start, quickly: what a crash left half-made is doomed, directories no snapshot owns are set aside."""
        unfinished = self._meta.doom_unfinished()
        if unfinished:
            log.info("%d lazy snapshots were left half-made; they will be cleaned up", unfinished)
        for stray in self._directories.strays(self._meta.ids()):
            try:
                self._clones.drop(stray / "l")
                for place in (stray / "fs", stray / "m"):
                    self._layers.unbind(place)
                self._directories.set_aside(stray)
            except Exception as error:
                # One bad directory must not keep the node from starting.
                log.warning("directory %s belongs to no snapshot and cannot be moved away: %r", stray, error)

    def tidy(self) -> None:
        """After `recover` and once all is mounted again, at leisure: delete what was set aside, and clean up."""
        for path in self._directories.set_aside_before():
            try:
                self._directories.remove(path)
            except CancelledError:
                return
            except Exception as error:
                log.warning("directory %s cannot be deleted: %r", path, error)
        self.cleanup()

    def cleanup(self) -> None:
        """Give back what removed snapshots hold. What cannot be had yet is left for the next time, with a log line."""
        with self._cleaning:
            for snapshot in self._meta.doomed():
                try:
                    self._give_back(snapshot)
                except CancelledError:
                    return
                except BusyError as error:
                    self._count("cleanup_busy")
                    log.info("snapshot %d is still in use and stays for the next cleanup: %s", snapshot.id, error)
                except Exception as error:
                    # One bad snapshot must not keep the others.
                    self._count("cleanup_failed")
                    known = isinstance(error, FloeError)
                    log.warning("snapshot %d cannot be cleaned up yet: %r", snapshot.id, error, exc_info=not known)
            self._release_lost()
            self._sweep()

    def _give_back(self, snapshot: Snapshot) -> None:
        self._directories.check()
        self._clones.drop(self._places.clones(snapshot.id))
        self._lazy.detach(snapshot)
        self._directories.remove(self._places.directory(snapshot.id))
        self._meta.forget(snapshot.id)

    def _release_lost(self) -> None:
        """End uses recorded for snapshots of which nothing is known: a crash, or a database put back from a backup."""
        # In this order: whatever is recorded was in the database before, as long as it is needed.
        uses = self._layers.uses()
        known = self._meta.ids()
        for tree, owner in uses:
            number = owner.removeprefix(OWNER_PREFIX)
            if self._stop.is_set():
                return
            if owner.startswith(OWNER_PREFIX) and number.isdecimal() and int(number) not in known:
                try:
                    self._layers.release(tree, owner)
                    log.info("tree %s was kept for snapshot %s, which is gone: released", tree, number)
                except (FloeError, OSError) as error:
                    log.info("tree %s is kept for snapshot %s, which is gone: %s", tree, number, error)

    def _sweep(self) -> None:
        """What a release had to leave, and what was pinned before a reboot."""
        if not self._stop.is_set():
            try:
                self._layers.sweep()
            except (FloeError, OSError) as error:
                log.warning("trees that nobody uses cannot be swept: %s", error)
