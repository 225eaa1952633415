"""An index in a SQLite file: for one machine, shared by its processes and threads.

The file can be lost at any time. A damaged one, one of another program or of another version of Floe is set aside
(renamed) and a new one begun. Every operation is one transaction that first compares the store's uuid, so
that two processes with different stores on one file cannot mix their chunks up: the later `bind` wins, the other
process gets UnavailableError and goes on with its bucket.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from floe.store.errors import UnavailableError
from floe.store.index.base import ChunkPlace, Note
from floe.store.packindex import ChunkEntry

_log = logging.getLogger(__name__)
T = TypeVar("T")

_APPLICATION_ID = 0x464C4F45  # "FLOE", in the file's header: tells our file from another program's
_SCHEMA_VERSION = 1
_BUSY_TIMEOUT = 5.0  # seconds to wait for another process's transaction
_WAL_LIMIT = 64 << 20  # bytes the write-ahead log is cut back to after a large push
# Beside the schema and not of it: an earlier version of Floe that finds this table leaves it alone.
_NOTES = """
CREATE TABLE IF NOT EXISTS notes (
    store    TEXT NOT NULL,             -- uuid of the store that it is about
    topic    TEXT NOT NULL,
    name     TEXT NOT NULL,
    data     BLOB NOT NULL,
    written  REAL NOT NULL,             -- seconds since 1970, by this machine's clock
    until    REAL NOT NULL,             -- likewise: from then on it counts as gone
    PRIMARY KEY (store, topic, name)
) WITHOUT ROWID
"""
_SCHEMA = """
-- One row: the store that everything below belongs to.
CREATE TABLE store (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    uuid  TEXT NOT NULL                 -- StoreRecord.uuid in the store's floe.json
);
-- Published packs. A row means: all chunks of this pack are in `chunks` (both are written in one transaction).
CREATE TABLE packs (
    number  INTEGER PRIMARY KEY,        -- local to this file, to keep `chunks` small
    id      TEXT NOT NULL UNIQUE        -- pack id: 64 lowercase hex digits
);
-- Where content is stored. The same chunk may lie in several packs.
CREATE TABLE chunks (
    digest  BLOB NOT NULL,              -- blake3 of the chunk, 32 bytes
    length  INTEGER NOT NULL,           -- bytes, at least 1
    pack    INTEGER NOT NULL REFERENCES packs (number),
    block   INTEGER NOT NULL,           -- first 4 KiB block in the pack's content
    PRIMARY KEY (digest, length, pack)
) WITHOUT ROWID;
-- Copies of refs that rarely change: layers and chains.
CREATE TABLE refs (
    key   TEXT PRIMARY KEY,             -- the ref's key in the store
    data  BLOB NOT NULL                 -- the ref object's bytes
) WITHOUT ROWID;
"""


class SqliteIndex:
    """The index in the file `path`. Thread-safe: one connection, one operation at a time."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:{path}"
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int, int] | None = None  # process, device and inode that the connection is for
        self._store_uuid: str | None = None

    def bind(self, store_uuid: str) -> None:
        """See Index.bind."""
        with self._lock:
            self._store_uuid = store_uuid
            self._run(lambda db: _bind(db, store_uuid, self.url), check=False)

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks."""
        wanted = list(keys)

        def find(db: sqlite3.Connection) -> dict[tuple[bytes, int], ChunkPlace]:
            found = {}
            query = (
                "SELECT packs.id, chunks.block FROM chunks JOIN packs ON packs.number = chunks.pack"
                " WHERE digest = ? AND length = ? ORDER BY pack LIMIT 1"
            )
            for key in wanted:
                row = db.execute(query, key).fetchone()
                if row is not None:
                    found[key] = ChunkPlace(*row)
            return found

        return self._run(find)

    def pack_ids(self) -> set[str]:
        """See Index.pack_ids."""
        return self._run(lambda db: {row[0] for row in db.execute("SELECT id FROM packs")})

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """See Index.add_pack."""
        entries = [(c.digest, c.length, c.block) for c in chunks]

        def add(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR IGNORE INTO packs (id) VALUES (?)", (pack_id,))
            (number,) = db.execute("SELECT number FROM packs WHERE id = ?", (pack_id,)).fetchone()
            db.executemany(
                "INSERT OR REPLACE INTO chunks (digest, length, pack, block) VALUES (?, ?, ?, ?)",
                ((digest, length, number, block) for digest, length, block in entries),
            )

        self._run(add, write=True)

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """See Index.remove_packs; looks at every chunk, which garbage collection can afford."""
        gone = [(pack_id,) for pack_id in pack_ids]

        def remove(db: sqlite3.Connection) -> None:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS gone (number INTEGER PRIMARY KEY)")
            db.execute("DELETE FROM gone")
            db.executemany("INSERT INTO gone SELECT number FROM packs WHERE id = ?", gone)
            db.execute("DELETE FROM chunks WHERE pack IN (SELECT number FROM gone)")
            db.execute("DELETE FROM packs WHERE number IN (SELECT number FROM gone)")

        if gone:
            self._run(remove, write=True)

    def get_ref(self, key: str) -> bytes | None:
        """See Index.get_ref."""
        row = self._run(lambda db: db.execute("SELECT data FROM refs WHERE key = ?", (key,)).fetchone())
        return None if row is None else bytes(row[0])

    def put_ref(self, key: str, data: bytes) -> None:
        """See Index.put_ref."""
        self._run(lambda db: db.execute("INSERT OR REPLACE INTO refs VALUES (?, ?)", (key, data)), write=True)

    def delete_ref(self, key: str) -> None:
        """See Index.delete_ref."""
        self._run(lambda db: db.execute("DELETE FROM refs WHERE key = ?", (key,)), write=True)

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """See Index.put_note."""
        now = time.time()

        def put(db: sqlite3.Connection) -> None:
            row = (self._store_uuid or "", topic, name, data, now, now + seconds)
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("DELETE FROM notes WHERE until <= ?", (now,))

        self._run(put, write=True)

    def notes(self, topic: str) -> Mapping[str, Note]:
        """See Index.notes."""
        now = time.time()
        query = "SELECT name, data, written FROM notes WHERE store = ? AND topic = ? AND until > ?"
        rows = self._run(lambda db: db.execute(query, (self._store_uuid or "", topic, now)).fetchall())
        return {name: Note(bytes(data), max(0.0, now - written)) for name, data, written in rows}

    def delete_note(self, topic: str, name: str) -> None:
        """See Index.delete_note."""
        row = (self._store_uuid or "", topic, name)
        self._run(
            lambda db: db.execute("DELETE FROM notes WHERE store = ? AND topic = ? AND name = ?", row), write=True
        )

    def close(self) -> None:
        """See Index.close."""
        with self._lock:
            self._disconnect()

    def _run(self, work: Callable[[sqlite3.Connection], T], *, write: bool = False, check: bool = True) -> T:
        """One transaction of `work`; a damaged file is replaced once. UnavailableError for everything else."""
        with self._lock:
            for last in (False, True):
                try:
                    db = self._connect()
                    with _transaction(db, write=write or not check):
                        if check:
                            self._check_store(db)
                        return work(db)
                except sqlite3.Error as error:
                    if last or not _is_damage(error):
                        self._disconnect()
                        raise self._unavailable(error) from error
                    self._set_aside(str(error))
                except OSError as error:
                    raise self._unavailable(error) from error
        raise AssertionError  # the second round returns or raises

    def _check_store(self, db: sqlite3.Connection) -> None:
        if self._store_uuid is None:
            return
        row = db.execute("SELECT uuid FROM store").fetchone()
        if row is None:  # set aside or deleted since `bind`: empty, so it can become ours
            db.execute("INSERT INTO store VALUES (1, ?)", (self._store_uuid,))
        elif row[0] != self._store_uuid:
            raise UnavailableError(
                f"index {self.url} was taken over by another store",
                hint="give each store its own index (FLOE_INDEX or --index)",
            )

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity == self._file_identity():
            return self._connection
        # Forked, or the file was deleted or set aside by another process.
        self._disconnect()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._file_lock():
            self._identity = self._file_identity()  # known even when opening fails
            self._connection = _open(self._path)
            self._identity = self._file_identity()
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._identity is not None and self._identity[0] == os.getpid():
            connection.close()

    def _file_identity(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return os.getpid(), status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        """Held while the file is created, or set aside: only one process does either."""
        fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _set_aside(self, reason: str) -> None:
        damaged = self._identity
        self._disconnect()
        with self._file_lock():
            if damaged is not None and self._file_identity() != damaged:
                return  # another process was faster
            aside = f"{self._path}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self._path}{suffix}", f"{aside}{suffix}")  # noqa: PTH104 - plain strings
        _log.warning("index %s cannot be used (%s): set aside as %s, starting a new one", self.url, reason, aside)

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"index {self.url} cannot be used: {error}", hint="Floe goes on with the store alone")


class _ForeignError(sqlite3.DatabaseError):
    """A sound SQLite file, but not ours."""


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        (application_id,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and (application_id, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
            raise _ForeignError("it belongs to another program or another version of Floe")  # noqa: TRY301 - closed below
        db.execute("PRAGMA journal_mode = WAL")
        # A power cut may lose the last transactions, never the file's consistency; they are in the bucket.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
        if not tables:
            path.chmod(0o600)
            identity = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_SCHEMA_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{identity}COMMIT;")
        db.execute(_NOTES)
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, *, write: bool) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _bind(db: sqlite3.Connection, store_uuid: str, url: str) -> None:
    row = db.execute("SELECT uuid FROM store").fetchone()
    if row is not None and row[0] == store_uuid:
        return
    if row is not None:
        _log.warning("index %s belonged to another store: emptied", url)
        for table in ("chunks", "packs", "refs", "store"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names
    db.execute("INSERT INTO store VALUES (1, ?)", (store_uuid,))


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether a new file would help: the content is wrong, as opposed to locked, full or forbidden."""
    if isinstance(error, _ForeignError):
        return True
    text = str(error)
    return isinstance(error, sqlite3.DatabaseError) and any(
        sign in text for sign in ("malformed", "not a database", "no such table", "no such column", "disk image")
    )
