"""Damage at rest, told to whoever can heal it: the log and the node's status by name, the store by a record for the next push.

One daemon thread does it, a moment after a frame was found damaged. Readers have had their error by then.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any

from floe.fuse.residency import Mounted
from floe.store.damage import KnownDamage, report
from floe.store.errors import AccessDeniedError, FloeError
from floe.store.objects.base import ObjectStore

_log = logging.getLogger(__name__)

_SETTLE = 1.0  # seconds: damaged frames come in groups
_AGAIN = 60.0  # seconds until a store that did not take a report is told again
_NODE = 64  # characters of this machine's name


class DamageReports:
    """Reports what is in `known` to `store`, which retries by itself.

    `mounted` tells what is mounted, `packs_of` a tree's packs, `source_of` its source (see profiles.py); the last two may
    raise the store's errors. Thread-safe.
    """

    def __init__(
        self,
        known: KnownDamage,
        store: ObjectStore,
        *,
        mounted: Callable[[], Iterable[Mounted]],
        packs_of: Callable[[str], Iterable[str]],
        source_of: Callable[[str], str | None],
        settle: float = _SETTLE,
    ) -> None:
        self._known = known
        self._store = store
        self._mounted = mounted
        self._packs_of = packs_of
        self._source_of = source_of
        self._settle = settle
        self._told: dict[str, frozenset[int]] = {}  # frames, by pack, that the store was told
        self._sources: dict[str, str] = {}  # by tree
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="floe-damage", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Begin nothing more; waits for no network."""
        self._stopping.set()
        self._known.changed.set()

    def status(self) -> list[dict[str, Any]]:
        """For each damaged pack: `pack`, its `frames` (numbers), `since` (RFC 3339), mounted `trees` over it and their `sources`."""
        found = []
        trees = self._trees()
        for pack_id, frames in self._known.frames.items():
            over = [tree.tree for tree, packs in trees if pack_id in packs]
            sources = {self._name(tree) for tree, packs in trees if pack_id in packs}
            first = datetime.fromtimestamp(min(frames.values()), timezone.utc)
            since = first.strftime("%Y-%m-%dT%H:%M:%SZ")
            named = {"trees": over, "sources": sorted(sources - {""})}
            found.append({"pack": pack_id, "frames": sorted(frames), "since": since, **named})
        return found

    def _run(self) -> None:
        again: float | None = None
        while True:
            self._known.changed.wait(again)
            if self._stopping.wait(self._settle):
                return
            self._known.changed.clear()
            try:
                again = None if self._tell() else _AGAIN
            except Exception:
                _log.exception("damage could not be reported")
                again = _AGAIN

    def _tell(self) -> bool:
        """Report what is news; whether all of it was."""
        done = True
        self._told = {pack_id: told for pack_id, told in self._told.items() if pack_id in self._known}
        for pack_id, frames in self._known.frames.items():
            news = frames.keys() - self._told.get(pack_id, frozenset())
            if news:
                sources = self._learn_sources(pack_id)
                whose = f", of {', '.join(sources)}" if sources else ""
                _log.error("pack %s%s is damaged in %s: frames %s", pack_id, whose, self._store.url, _shown(frames))
                done = self._report(pack_id, frames.keys(), sources) and done
        return done

    def _report(self, pack_id: str, frames: Iterable[int], sources: list[str]) -> bool:
        try:
            report(self._store, pack_id, frames, sources, socket.gethostname()[:_NODE])
        except AccessDeniedError as error:
            _log.warning(
                "the store is not told, for this node may not write below damaged/: push with --verify (%s)", error
            )
        except FloeError as error:
            _log.warning("the store could not be told that pack %s is damaged, and will be: %s", pack_id, error)
            return False
        self._told[pack_id] = frozenset(frames)
        return True

    def _trees(self) -> list[tuple[Mounted, tuple[str, ...]]]:
        found = []
        for mounted in self._mounted():
            try:
                found.append((mounted, tuple(self._packs_of(mounted.tree))))
            except (FloeError, OSError) as error:
                _log.debug("the packs of tree %s: %s", mounted.tree, error)
        return found

    def _learn_sources(self, pack_id: str) -> list[str]:
        """The sources of trees over a pack, as far as that can be had."""
        found = set()
        for mounted, packs in self._trees():
            if pack_id not in packs:
                continue
            try:
                if mounted.model is None and mounted.tree not in self._sources:
                    self._sources[mounted.tree] = self._source_of(mounted.tree) or ""
            except FloeError as error:
                _log.debug("the source of tree %s: %s", mounted.tree, error)
            found.add(self._name(mounted))
        return sorted(found - {""})

    def _name(self, mounted: Mounted) -> str:
        return f"models/{mounted.model}" if mounted.model else self._sources.get(mounted.tree, "")


def _shown(frames: Iterable[int], most: int = 20) -> str:
    numbers = sorted(frames)
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more
