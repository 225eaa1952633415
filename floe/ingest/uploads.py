"""Sealed packs on their way to the store: pack, chunk table, index; only then may others build upon it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from floe.ingest.packwriter import SealedPack
from floe.ingest.session import Session
from floe.ingest.spool import Spool
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import CancelledError, NotFoundError, StoreMissingError
from floe.store.records import PackEntry

_WAITING = 2  # sealed packs on local disk, with the one that is being uploaded


class Uploads:
    """Uploads packs one after another, in a thread of its own; one thread calls it. `stopped`: the push is given up."""

    def __init__(self, catalog: Catalog, session: Session, spool: Spool, stopped: Callable[[], bool]) -> None:
        self._catalog, self._store = catalog, catalog.store
        self._packs, self._protection = session.packs, session.protection
        self._spool = spool
        self._stopped = stopped
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="floe-upload")
        self._waiting: list[Future[None]] = []

    def add(self, pack: SealedPack) -> None:
        """Upload it later; waits while there are enough others. Raises what an earlier upload failed of."""
        while len(self._waiting) >= _WAITING:
            self._waiting.pop(0).result()
        self._waiting.append(self._uploader.submit(self._upload, pack))

    def wait(self) -> None:
        """Until all are stored. Raises what an upload failed of."""
        while self._waiting:
            self._waiting.pop(0).result()

    def close(self) -> None:
        """End the one under way once `stopped` says so; the others are not begun."""
        self._uploader.shutdown(wait=True, cancel_futures=True)

    def _upload(self, pack: SealedPack) -> None:
        try:
            self._packs.protect((pack.id,))
            if not self._is_stored(pack):
                self._store.put_file(layout.pack_key(pack.id), pack.path, self._uploaded)
        finally:  # also when it failed, lest somebody wait for this room forever
            pack.path.unlink(missing_ok=True)
            self._spool.give_back(pack.index.content_size)
        self._store.put(layout.chunk_table_key(pack.id), pack.table_data)
        self._store.put(layout.pack_index_key(pack.id), pack.index_data)
        # Only now may others build upon it.
        self._packs.add(PackEntry(pack.id, pack.index.content_size, pack.index.stored_size, pack.index.frame_size))
        self._catalog.add_pack(pack.id, pack.chunks)

    def _is_stored(self, pack: SealedPack) -> bool:
        """Whether a push that died before it wrote the index left the pack, which is put whole or not at all."""
        try:
            return self._store.head(layout.pack_key(pack.id)).size == pack.index.stored_size
        except StoreMissingError:
            raise
        except NotFoundError:
            return False

    def _uploaded(self, _nbytes: int) -> None:
        # Called between the parts of an upload: whoever interrupts a push does not wait for 4 GiB to go out first.
        if self._stopped():
            raise CancelledError("the push was stopped; nothing was published")
        self._protection.renew()
