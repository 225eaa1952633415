"""The snapshotter's memory: names, parents, kinds and labels in SQLite.

Vocabulary (containerd's): a *key* names an active snapshot or a view, a *name* a committed one; both are opaque text.
One connection serves all threads under one lock, held for the length of a transaction and never while anything is
mounted, fetched or measured. WAL with synchronous=FULL: what was answered to containerd survives a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from floe.snapshotter.mounts import is_remap
from floe.snapshotter.schema import (
    COLUMNS,
    MIGRATIONS,
    SCHEMA,
    SCHEMA_VERSION,
    Kind,
    Snapshot,
    dump_labels,
    snapshot_of,
)
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

# containerd's label for the chain id a Prepare is meant to become.
REF = "containerd.io/snapshot.ref"
# How long a statement waits for another process's lock on the database (a backup, sqlite3's shell), in seconds.
BUSY_TIMEOUT = 2.0


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
                version = SCHEMA_VERSION
            for newer in range(version + 1, SCHEMA_VERSION + 1):
                self._db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[newer]} PRAGMA user_version = {newer}; COMMIT;")
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

    def lives(self, snapshot_id: int) -> bool:
        """Whether that snapshot is known to containerd: not removed, nor in the making."""
        with self._transaction():
            return bool(self._select("id = ? AND state = 'live'", (snapshot_id,)))

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
                (key, above.id if above else 0, kind, dump_labels(labels), now, now, model, model is not None),
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
                (name_prefix, parent, Kind.COMMITTED, dump_labels(labels), now, now, chain, tree),
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
            # In this order, as overlayfs answers.
            active = self._get(key)
            if self._find(name) is not None:
                raise AlreadyExistsError(f"snapshot {name!r} exists already")
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
                " model = ?, alone = ?, remapped = ? WHERE id = ?",
                (
                    name,
                    parent,
                    Kind.COMMITTED,
                    dump_labels(labels),
                    now,
                    now,
                    model[0] if model else None,
                    bool(model and model[1]),
                    is_remap(key, name),
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
            if found.chain is not None:
                # containerd finds a lazy snapshot by this label, and would unpack above one that lost it.
                merged[REF] = found.chain
            self._db.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
                (dump_labels(merged), time.time_ns(), found.id),
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
            f"SELECT {COLUMNS}, (SELECT name FROM snapshots AS p WHERE p.id = s.parent)"  # noqa: S608
            f" FROM snapshots AS s WHERE {where}"
        )
        return [snapshot_of(row) for row in self._db.execute(query, values)]

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
            hint = "see why that disk is read-only (dmesg)" if "readonly" in str(error) else ""
            raise UnavailableError(text, hint=hint) from error
