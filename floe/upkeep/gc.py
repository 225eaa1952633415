"""Garbage collection: what nobody names, for long enough, is removed. docs/FORMAT.md, "Garbage collection", has the rules.

Whatever happens meanwhile, and wherever it is stopped, nothing that a name leads to is removed: see floe/store/protection.py for
pushes, and Marks for readers of what was named until lately.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, FloeError, NotFoundError, UnavailableError
from floe.store.objects.multipart import Uploads
from floe.store.progress import Progress
from floe.store.protection import ABANDONED_AFTER, read_pushes
from floe.store.records import Ref
from floe.store.retention import read_retention
from floe.upkeep.garbage import KINDS, Marks, Unit, find_garbage, leftovers, objects_of, read_marks
from floe.upkeep.names import NameReader, Problem
from floe.upkeep.reach import Follower, Reach
from floe.upkeep.turn import LEASE, Turn

_log = logging.getLogger(__name__)

GRACE = 86_400.0  # seconds
BATCH = 2048  # units removed before it is looked again who needs what
_DELETERS = 16
_LEAST_LEFTOVER = 3600.0  # seconds; a check or a bench may be at work
_SHOWN = 5


@dataclass
class Tally:
    """So many things, and their bytes."""

    count: int = 0
    size: int = 0

    def add(self, size: int) -> None:
        """One more."""
        self.count += 1
        self.size += size


@dataclass
class Report:
    """What was found, by kind. `unneeded`: named by nothing; of that `due`: for longer than the grace period.

    `removed`: what was; `kept`: due, but needed after all: a push relies on it, or has named it meanwhile. `pushes`: those under
    way, `dead_pushes` those that said nothing for days. `uploads`: unfinished ones that were, or would be, aborted;
    `leftovers`: of checks and benches, likewise. `expired`: tags that the store's retention rules
    let go, or would. `next_due`: seconds until the first of what is not due is; None: nothing.
    """

    unneeded: dict[str, Tally] = field(default_factory=dict)
    due: dict[str, Tally] = field(default_factory=dict)
    removed: dict[str, Tally] = field(default_factory=dict)
    kept: Tally = field(default_factory=Tally)
    needed_packs: int = 0
    pushes: int = 0
    dead_pushes: int = 0
    uploads: int = 0
    leftovers: Tally = field(default_factory=Tally)
    next_due: float | None = None
    expired: tuple[str, ...] = ()


class Collector:
    """Finds, and removes, what nobody needs in the store of `catalog`.

    `uploads`: the store's multipart uploads, None for a store without. `grace`: seconds, see Marks. Memory: some 200 bytes
    for each manifest, tree, pack and name.
    """

    def __init__(
        self,
        catalog: Catalog,
        uploads: Uploads | None,
        *,
        grace: float = GRACE,
        progress: Progress | None = None,
        lease: float = LEASE,
        batch: int = BATCH,
    ) -> None:
        self._catalog, self._store, self._uploads = catalog, catalog.store, uploads
        self._grace, self._progress, self._batch = grace, progress, batch
        self._names, self._follower = NameReader(self._store), Follower(catalog)
        self._turn = Turn(self._store, lease=lease)

    def look(self) -> Report:
        """What `remove` would do, by this machine's clock; changes nothing.

        DamagedError: something that is named cannot be followed, so that nobody knows what it needs.
        """
        self._catalog.check_store()
        report = self._survey(datetime.now(timezone.utc).timestamp())[0]
        report.expired = _tags(self._expired())
        return report

    def remove(self) -> Report:
        """Mark what is unneeded, and remove what was for the grace period.

        Errors before anything changes: AccessDeniedError, no permission to delete; BusyError, another collector;
        UnsupportedError, the server; DamagedError, as above. What was removed until a later error stays removed, and
        nothing else is affected; the next one goes on.
        """
        self._catalog.check_store()
        try:
            now = self._turn.take()
            expired = self._remove_tags(now)
            report, units, since, litter = self._survey(now)
            report.expired = _tags(expired)
            due = {key: unit for key, unit in units.items() if now - since[key] >= self._grace}
            self._store.put(layout.MARKS_KEY, Marks.of(since.items()).encode())
            if self._progress is not None:
                self._progress.total(sum(unit.size for unit in due.values()))
            for batch in _batches(due, self._batch):
                self._remove(batch, report, now)
            self._turn.say(())
            self._delete(litter)
            self._abort_uploads(now)
        finally:
            self._turn.release()
        return report

    # Looking

    def _survey(self, now: float) -> tuple[Report, dict[str, Unit], dict[str, float], list[str]]:
        """The report so far, all units that nobody needs, since when; records of dead pushes, and what checks and benches left."""
        report = Report()
        protected, alive, dead = self._pushes(now)
        reach = self._reach()
        units = find_garbage(self._store, reach.keys | protected)
        marks = read_marks(self._store)
        # A server may tell times in whole seconds here and in parts of them there.
        since = {key: min(max(marks.get(key, now), unit.modified), now) for key, unit in units.items()}
        for key, unit in units.items():
            report.unneeded.setdefault(unit.kind, Tally()).add(unit.size)
            wait = self._grace - (now - since[key])
            if wait <= 0:
                report.due.setdefault(unit.kind, Tally()).add(unit.size)
            elif report.next_due is None or wait < report.next_due:
                report.next_due = wait
        report.needed_packs = sum(key.startswith(f"{layout.PACKS}/") for key in reach.keys)
        report.pushes, report.dead_pushes = alive, len(dead)
        litter = list(dead)
        for key, size, modified in leftovers(self._store):
            if self._is_left(now, modified):
                report.leftovers.add(size)
                litter.append(key)
        report.uploads = len(self._old_uploads(now, protected))
        return report, units, since, litter

    def _reach(self) -> Reach:
        reach = self._follower.follow(self._names.read())
        if reach.problems:
            raise _unknown(reach.problems)
        return reach

    def _pushes(self, now: float) -> tuple[set[str], int, list[str]]:
        """What pushes under way rely on; how many they are; the records of those that are dead, or have ended."""
        protected, alive, dead = set[str](), 0, list[str]()
        for key, record in read_pushes(self._store, since=now - ABANDONED_AFTER):
            if record is None or not record.keys:
                dead.append(key)
            else:
                alive += 1
                protected.update(record.keys)
        return protected, alive, dead

    def _is_left(self, now: float, modified: float) -> bool:
        return now - min(modified, now) >= max(self._grace, _LEAST_LEFTOVER)

    def _old_uploads(self, now: float, protected: set[str]) -> list[tuple[str, str]]:
        if self._uploads is None:
            return []
        try:
            found = self._uploads.find("packs/")
        except FloeError as error:  # who may not list them, or a server that does not tell
            _log.warning("unfinished uploads are left: %s", error)
            return []
        old = (upload for upload in found if now - min(upload.begun.timestamp(), now) >= self._grace)
        return [(upload.key, upload.id) for upload in old if upload.key not in protected]

    # Removing

    def _expired(self) -> dict[str, Ref]:
        """Refs of models that the rules let go now. DamagedError when the rules, or a name, cannot be read."""
        retention = read_retention(self._store)
        if not retention.rules:
            return {}
        names = self._names.read()
        if names.problems:
            raise _unknown(names.problems)
        return retention.expired(names.models)

    def _remove_tags(self, now: float) -> dict[str, Ref]:
        """Remove tags that the rules let go, but those that a push moves meanwhile; what they named is unneeded from then on."""
        due = self._expired()
        if not due:
            return {}
        self._turn.say(due)
        protected, _, _ = self._pushes(now)
        still = self._expired()  # after the pushes: one that has ended has moved its tag
        gone = {key: ref for key, ref in due.items() if still.get(key) == ref and key not in protected}
        self._delete(gone)
        self._turn.say(())
        return gone

    def _remove(self, batch: dict[str, Unit], report: Report, now: float) -> None:
        """Say what may go; then look who needs it, pushes before names, as they name what they stored before they end."""
        self._turn.say(batch)
        protected, _, _ = self._pushes(now)
        needed = self._reach().keys
        todo = {}
        for key, unit in batch.items():
            if key in protected or key in needed:
                report.kept.add(unit.size)
            else:
                todo[key] = unit
        self._forget(todo)
        for kind in dict.fromkeys(KINDS.values()):
            units = {key: unit for key, unit in todo.items() if unit.kind == kind}
            with ThreadPoolExecutor(_DELETERS, thread_name_prefix="floe-gc") as pool:
                for size in pool.map(self._remove_unit, units, (unit.size for unit in units.values())):
                    report.removed.setdefault(kind, Tally()).add(size)
                    if self._progress is not None:
                        self._progress.advance(size)

    def _remove_unit(self, key: str, size: int) -> int:
        self._delete(objects_of(key))
        return size

    def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._turn.check()
            self._store.delete(key)

    def _forget(self, units: Iterable[str]) -> None:
        """Let the index forget first; what it knows too long is looked for in the bucket before it is relied upon."""
        index = self._catalog.index
        try:
            index.remove_packs([key.rpartition("/")[2] for key in units if key.startswith(f"{layout.PACKS}/")])
            for key in units:
                if key.startswith((f"{layout.LAYER_REFS}/", f"{layout.CHAIN_REFS}/")):
                    index.delete_ref(key)
        except UnavailableError as error:
            _log.warning("%s; it is told by the next push", error)

    def _abort_uploads(self, now: float) -> None:
        """Those of pushes that began since are protected: an upload begins after its push said so."""
        protected, _, _ = self._pushes(now)
        for key, upload in self._old_uploads(now, protected):
            assert self._uploads is not None
            self._turn.check()
            try:
                self._uploads.abort(key, upload)
            except NotFoundError:  # completed, or aborted by somebody else
                continue


def _tags(expired: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(str(layout.parse_model_ref_key(key)) for key in expired))


def _batches(units: dict[str, Unit], size: int) -> Iterator[dict[str, Unit]]:
    keys = list(units)
    for start in range(0, len(keys), size):
        yield {key: units[key] for key in keys[start : start + size]}


def _unknown(problems: list[Problem]) -> FloeError:
    told = "; ".join(f"{problem.key}: {problem.error}" for problem in problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return DamagedError(
        f"nobody knows what these need, so nothing more is removed: {told}{more}",
        hint="`floe fsck` says whom that affects; push or index again, or remove the names with `floe model rm`, `floe image rm`",
    )
