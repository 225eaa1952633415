"""The snapshotter's memory: names, parents, kinds and labels in SQLite.

Vocabulary (containerd's): a *key* names an active snapshot or a view, a *name* a committed one; both are opaque text.
One connection serves all threads under one lock, held for the length of a transaction and never while anything is
mounted, fetched or measured. WAL with synchronous=FULL: what was answered to containerd survives a power cut.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from floe.store.errors import (
    AlreadyExistsError,
    BadInputError,
    DamagedError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)

SCHEMA_VERSION = 1
# How long a statement waits for another process's lock on the database (a backup, sqlite3's shell), in seconds.
BUSY_TIMEOUT = 2.0

SCHEMA = """
CREATE TABLE snapshots (
  -- Names the directory <root>/s/<id>; counts up and is never used twice.
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  -- containerd's key or name, opaque; unique among snapshots that are not doomed.
  name    TEXT NOT NULL,
  -- id of the parent; 0: none. Whoever has a living child is committed and not doomed.
  parent  INTEGER NOT NULL,
  -- 1 view, 2 active, 3 committed: containerd's numbers.
  kind    INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
  -- 'live': containerd sees it. 'making': a lazy snapshot being mounted, seen by nobody; after a crash it is doomed.
  -- 'doomed': removed, its mounts and directories still to be given back by Cleanup.
  state   TEXT NOT NULL CHECK (state IN ('live', 'making', 'doomed')),
  -- JSON object of texts; no value is empty.
  labels  TEXT NOT NULL,
  -- Nanoseconds since 1970, UTC. Commit sets both anew, Update the second.
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  -- Lazy snapshots: the chain id asked for; NULL: an ordinary one.
  chain   TEXT,
  -- Digest of the tree whose bind is <root>/s/<id>/fs. Set exactly when chain is.
  tree    TEXT,
  -- Ordinary stub layers: digest of the model tree that stands in for it at <root>/s/<id>/m; NULL: none.
  model   TEXT,
  -- 1: the layer is the stub and nothing else, `model` replaces it. 0: `model` lies above it.
  alone   INTEGER NOT NULL DEFAULT 0,
  -- Disk usage in bytes and inodes, of committed ordinary snapshots; NULL: not measured yet.
  size    INTEGER,
  inodes  INTEGER
);
CREATE UNIQUE INDEX snapshots_name ON snapshots (name) WHERE state = 'live';
CREATE INDEX snapshots_parent ON snapshots (parent) WHERE state != 'doomed';
-- Two namespaces may ask for one chain id above different parents.
CREATE UNIQUE INDEX snapshots_lazy ON snapshots (chain, parent) WHERE state = 'live' AND chain IS NOT NULL;
"""
_COLUMNS = "id, name, parent, kind, labels, created, updated, chain, tree, model, alone, size, inodes"


class Kind(IntEnum):
    """containerd's kinds of snapshot; `label` is the word its filters use."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3

    @property
    def label(self) -> str:
        """The word: view, active or committed."""
        return self.name.lower()


@dataclass(frozen=True)
class Snapshot:
    """One row; see SCHEMA. `parent` is an id (0: none), `parent_name` that parent's name ("" for none)."""

    id: int
    name: str
    parent: int
    parent_name: str
    kind: Kind
    labels: Mapping[str, str]
    created: int
    updated: int
    chain: str | None = None
    tree: str | None = None
    model: str | None = None
    alone: bool = False
    size: int | None = None
    inodes: int | None = None


class Metastore:
    """Thread-safe; every method is one transaction of some milliseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        with self._translated():
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=BUSY_TIMEOUT)
        try:
            self._open()
        except FloeError:
            self._db.close()
            raise

    def _open(self) -> None:
        with self._translated():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if version > SCHEMA_VERSION:
            raise UnsupportedError(
                f"{self._path} has schema version {version}; this Floe knows version {SCHEMA_VERSION}",
                hint="run the newer Floe that wrote it",
            )

    def close(self) -> None:
        """Close the database; later calls fail."""
        with self._lock:
            self._db.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Snapshot:
        """The living snapshot `name`; NotFoundError."""
        with self._transaction():
            return self._get(name)

    def walk(self) -> list[Snapshot]:
        """All living snapshots, lazy ones first: containerd takes the first that answers a ref."""
        with self._transaction():
            return self._select("state = 'live' ORDER BY chain IS NULL, id")

    def chain(self, snapshot_id: int) -> list[Snapshot]:
        """The snapshot with that id and its ancestors, topmost first; [] for id 0."""
        with self._transaction():
            return self._chain(snapshot_id)

    def doomed(self) -> list[Snapshot]:
        """Removed snapshots whose mounts and directories are still there, youngest first."""
        with self._transaction():
            return self._select("state = 'doomed' ORDER BY id DESC")

    def ids(self) -> set[int]:
        """The ids of all rows, doomed and half-made ones included."""
        with self._transaction():
            return {row[0] for row in self._db.execute("SELECT id FROM snapshots")}

    def lazy(self, chain: str, parent: int) -> Snapshot | None:
        """The living lazy snapshot of chain id `chain` above the snapshot with id `parent`."""
        with self._transaction():
            found = self._select("state = 'live' AND chain = ? AND parent = ?", (chain, parent))
        return found[0] if found else None

    def check_new(self, key: str, parent: str) -> Snapshot | None:
        """The parent (None without one) of a snapshot about to be made.

        NotFoundError without that parent, BadInputError when it is not committed, AlreadyExistsError for a taken key.
        """
        with self._transaction():
            return self._check_new(key, parent)

    # -- writing ---------------------------------------------------------------------------------------------------

    def create(
        self,
        kind: Kind,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        place: Callable[[int], None],
        *,
        model: str | None = None,
    ) -> Snapshot:
        """Make an active snapshot or view; `place(id)` moves its directory there, inside the transaction."""
        with self._transaction(write=True):
            above = self._check_new(key, parent)
            now = time.time_ns()
            cursor = self._db.execute(
                "INSERT INTO snapshots (name, parent, kind, state, labels, created, updated, model, alone)"
                " VALUES (?, ?, ?, 'live', ?, ?, ?, ?, ?)",
                (key, above.id if above else 0, kind, _dump(labels), now, now, model, model is not None),
            )
            place(cursor.lastrowid or 0)
            return self._get(key)

    def begin_lazy(self, name_prefix: str, parent: int, labels: Mapping[str, str], chain: str, tree: str) -> Snapshot:
        """A committed lazy snapshot in the making, named `<name_prefix><id>`: seen by nobody until `finish_lazy`."""
        with self._transaction(write=True):
            now = time.time_ns()
            cursor = self._db.execute(
                "INSERT INTO snapshots (name, parent, kind, state, labels, created, updated, chain, tree)"
                " VALUES (?, ?, ?, 'making', ?, ?, ?, ?, ?)",
                (name_prefix, parent, Kind.COMMITTED, _dump(labels), now, now, chain, tree),
            )
            self._db.execute("UPDATE snapshots SET name = name || id WHERE id = ?", (cursor.lastrowid,))
            return self._select("id = ?", (cursor.lastrowid,))[0]

    def finish_lazy(self, snapshot_id: int) -> None:
        """Show the snapshot; AlreadyExistsError when one of the same chain and parent was shown before."""
        with self._transaction(write=True):
            made = self._select("id = ? AND state = 'making'", (snapshot_id,))[0]
            if self._select("state = 'live' AND chain = ? AND parent = ?", (made.chain, made.parent)):
                raise AlreadyExistsError(f"chain {made.chain} has been mounted by another request")
            if made.parent and not self._select("state = 'live' AND id = ?", (made.parent,)):
                raise NotFoundError(f"the parent of chain {made.chain} was removed meanwhile")
            self._db.execute("UPDATE snapshots SET state = 'live' WHERE id = ?", (snapshot_id,))

    def doom(self, snapshot_id: int) -> None:
        """Leave a snapshot in the making to Cleanup."""
        with self._transaction(write=True):
            self._db.execute("UPDATE snapshots SET state = 'doomed' WHERE id = ?", (snapshot_id,))

    def doom_unfinished(self) -> int:
        """At start: leave all that a crash left in the making to Cleanup; how many."""
        with self._transaction(write=True):
            return self._db.execute("UPDATE snapshots SET state = 'doomed' WHERE state = 'making'").rowcount

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str],
        new_parent: str,
        find_model: Callable[[Snapshot], tuple[str, bool] | None],
    ) -> Snapshot:
        """Turn the active snapshot `key` into the committed `name`, with these labels and no others.

        `new_parent` (containerd 2.2 and later, mostly "") gives a parent to a snapshot made without one.
        `find_model(snapshot)` says whether it is a stub: the model's tree and whether the layer is nothing else.
        """
        with self._transaction(write=True):
            if self._find(name) is not None:
                raise AlreadyExistsError(f"snapshot {name!r} exists already")
            active = self._get(key)
            if active.kind is not Kind.ACTIVE:
                raise PreconditionError(f"snapshot {key!r} is {active.kind.label}, not active: it cannot be committed")
            parent = active.parent
            if new_parent not in ("", active.parent_name):
                if parent:
                    raise BadInputError(f"snapshot {key!r} has a parent; commit cannot change it to {new_parent!r}")
                above = self._get(new_parent)
                if above.kind is not Kind.COMMITTED:
                    raise PreconditionError(f"parent {new_parent!r} is {above.kind.label}, not committed")
                parent = above.id
            model = find_model(active)
            now = time.time_ns()
            self._db.execute(
                "UPDATE snapshots SET name = ?, parent = ?, kind = ?, labels = ?, created = ?, updated = ?,"
                " model = ?, alone = ? WHERE id = ?",
                (
                    name,
                    parent,
                    Kind.COMMITTED,
                    _dump(labels),
                    now,
                    now,
                    model[0] if model else None,
                    bool(model and model[1]),
                    active.id,
                ),
            )
            return self._get(name)

    def remove(self, name: str) -> Snapshot:
        """Forget the name at once and leave the rest to Cleanup; PreconditionError while it has children."""
        with self._transaction(write=True):
            found = self._get(name)
            children = self._select("parent = ? AND state != 'doomed' LIMIT 1", (found.id,))
            if children:
                raise PreconditionError(
                    f"snapshot {name!r} is the parent of {children[0].name!r} and cannot be removed",
                    hint="remove its children first",
                )
            self._db.execute("UPDATE snapshots SET state = 'doomed' WHERE id = ?", (found.id,))
            return found

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels by an update mask; containerd's masks are `labels` and `labels.<key>`, none means `labels`."""
        with self._transaction(write=True):
            found = self._get(name)
            merged = dict(found.labels)
            for path in paths or ("labels",):
                if path == "labels":
                    merged = dict(labels)
                elif path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    merged[key] = labels.get(key, "")
                else:
                    raise BadInputError(
                        f"cannot update {path!r} of snapshot {name!r}", hint="only labels can be updated"
                    )
            self._db.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (_dump(merged), time.time_ns(), found.id)
            )
            return self._get(name)

    def set_usage(self, snapshot_id: int, size: int, inodes: int) -> None:
        """Remember what a committed snapshot's directory takes on disk."""
        with self._transaction(write=True):
            self._db.execute("UPDATE snapshots SET size = ?, inodes = ? WHERE id = ?", (size, inodes, snapshot_id))

    def forget(self, snapshot_id: int) -> None:
        """Delete a doomed row: nothing of it is left."""
        with self._transaction(write=True):
            self._db.execute("DELETE FROM snapshots WHERE id = ? AND state = 'doomed'", (snapshot_id,))

    # -- inside a transaction --------------------------------------------------------------------------------------

    def _check_new(self, key: str, parent: str) -> Snapshot | None:
        if not key:
            raise BadInputError("the snapshot's key is empty")
        above = None
        if parent:
            above = self._find(parent)
            if above is None:
                raise NotFoundError(f"parent snapshot {parent!r} does not exist")
            if above.kind is not Kind.COMMITTED:
                raise BadInputError(f"parent {parent!r} is {above.kind.label}, not committed")
        if self._find(key) is not None:
            raise AlreadyExistsError(f"snapshot {key!r} exists already")
        return above

    def _get(self, name: str) -> Snapshot:
        found = self._find(name)
        if found is None:
            raise NotFoundError(f"snapshot {name!r} does not exist")
        return found

    def _find(self, name: str) -> Snapshot | None:
        found = self._select("state = 'live' AND name = ?", (name,))
        return found[0] if found else None

    def _chain(self, snapshot_id: int) -> list[Snapshot]:
        found: list[Snapshot] = []
        while snapshot_id:
            found += self._select("id = ?", (snapshot_id,))
            snapshot_id = found[-1].parent
        return found

    def _select(self, where: str, values: tuple[object, ...] = ()) -> list[Snapshot]:
        # `where` is one of this module's own texts; what callers gave travels in `values`.
        query = (
            f"SELECT {_COLUMNS}, (SELECT name FROM snapshots AS p WHERE p.id = s.parent)"  # noqa: S608
            f" FROM snapshots AS s WHERE {where}"
        )
        return [_snapshot(row) for row in self._db.execute(query, values)]

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[None]:
        with self._lock, self._translated():
            self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A failed COMMIT (a full disk) may have rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = f"snapshot database {self._path}: {error}"
            if "full" in str(error):
                raise NoSpaceError(text, hint="free space on that disk") from error
            if "malformed" in str(error) or "not a database" in str(error):
                raise DamagedError(text, hint="move the root directory away and pull the images again") from error
            raise UnavailableError(text) from error


def _snapshot(row: Sequence[Any]) -> Snapshot:
    ident, name, parent, kind, labels, created, updated, chain, tree, model, alone, size, inodes, parent_name = row
    return Snapshot(
        id=ident,
        name=name,
        parent=parent,
        parent_name=parent_name or "",
        kind=Kind(kind),
        labels=json.loads(labels),
        created=created,
        updated=updated,
        chain=chain,
        tree=tree,
        model=model,
        alone=bool(alone),
        size=size,
        inodes=inodes,
    )


def _dump(labels: Mapping[str, str]) -> str:
    """Labels as stored: containerd drops those with an empty value."""
    return json.dumps({key: value for key, value in labels.items() if value}, ensure_ascii=False, sort_keys=True)
