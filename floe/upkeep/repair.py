"""Repairing what fsck found: a sound copy from elsewhere, or else the damaged pack's removal, so that the next push stores it anew.

A copy is compared with the digest that names it before it takes the object's place, and a pack is looked at again before it is
removed, so nothing can get worse by it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.damage import settle
from floe.store.errors import DamagedError, NotFoundError, UnavailableError, UnsupportedError
from floe.store.frames import encode_frames
from floe.store.ids import Buffer, hexdigest
from floe.store.objects.base import ObjectStore
from floe.store.packindex import PackIndex, decode_chunk_table
from floe.store.packpieces import Piece, pieces
from floe.store.protection import read_pushes
from floe.store.treeobject import decode_tree
from floe.upkeep.fsck import CHUNK_TABLE, MANIFEST, PACK, PACK_INDEX, TREE, Fault
from floe.upkeep.garbage import objects_of
from floe.upkeep.turn import LEASE, Turn
from floe.upkeep.verify import Pace, bad_frames

_log = logging.getLogger(__name__)

COPIED, FROM_CACHE, REMOVED = "copied", "taken from the node cache", "removed"
HEALED = "healed meanwhile"
_INDEXES_FIRST = (PACK_INDEX, CHUNK_TABLE, PACK, TREE, MANIFEST)


class Repairer:
    """Repairs faults of the store of `catalog`.

    `other`: a store with copies. `caches`: the packs' folders of this node's cache. `spool`: local disk for one pack. `read` is told
    the bytes of packs as they are read.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        other: ObjectStore | None = None,
        caches: Iterable[Path] = (),
        spool: Path | None = None,
        read: Callable[[int], object] = lambda _: None,
        lease: float = LEASE,
    ) -> None:
        self._catalog, self._store = catalog, catalog.store
        self._other, self._caches, self._spool, self._read = other, tuple(caches), spool, read
        self._lease = lease

    def repair(self, faults: Iterable[Fault]) -> None:
        """Do what can be done, and say so in each fault. Raises errors of either store, AccessDeniedError among them."""
        found = [fault for fault in faults if fault.kind in _INDEXES_FIRST]
        found.sort(key=lambda fault: _INDEXES_FIRST.index(fault.kind))
        for fault in found:
            if self._other is not None and self._copy(fault, self._other):
                fault.repair, fault.repaired = COPIED, True
            elif fault.kind == PACK and any(self._from_cache(fault.name, cache) for cache in self._caches):
                fault.repair, fault.repaired = FROM_CACHE, True
            if fault.kind == PACK and fault.repaired:
                settle(self._store, fault.name)
        self._remove(
            [fault for fault in found if not fault.repaired and fault.kind == PACK and fault.problem != "missing"]
        )

    # Copies

    def _copy(self, fault: Fault, other: ObjectStore) -> bool:
        """Whether a sound copy was put in the place of the object."""
        try:
            if fault.kind == PACK:
                return self._copy_pack(fault.name, other)
            data = bytes(other.get(fault.key))
            self._check(fault, data)
        except (NotFoundError, DamagedError, UnsupportedError):
            return False
        self._store.put(fault.key, data)
        return True

    def _check(self, fault: Fault, data: bytes) -> None:
        if fault.kind == TREE:
            decode_tree(data, fault.name)
        elif fault.kind == PACK_INDEX:
            PackIndex.decode(data, fault.name)
        elif fault.kind == CHUNK_TABLE:
            decode_chunk_table(data, self._index(fault.name), fault.name)
        elif hexdigest(data) != fault.name:
            raise DamagedError(f"{fault.key} does not match its digest")

    def _index(self, pack_id: str) -> PackIndex:
        return PackIndex.decode(self._store.get(layout.pack_index_key(pack_id)), pack_id)

    def _copy_pack(self, pack_id: str, other: ObjectStore) -> bool:
        index = self._index(pack_id)
        with tempfile.NamedTemporaryFile(dir=self._spool) as file:

            def keep(_piece: Piece, data: Buffer) -> None:
                file.write(data)  # pieces come in order

            if bad_frames(other, pack_id, index, Pace(None), self._read, keep=keep):
                return False
            file.flush()
            self._store.put_file(layout.pack_key(pack_id), Path(file.name))
        return True

    def _from_cache(self, pack_id: str, cache: Path) -> bool:
        """A pack that is complete here holds the content; stored once more it may differ in length, and is no use then."""
        folder = cache / pack_id
        try:
            index = self._index(pack_id)
            (folder / "complete").stat()
            data = (folder / "data").open("rb")
        except (NotFoundError, DamagedError, UnsupportedError, OSError):
            return False
        with data, tempfile.NamedTemporaryFile(dir=self._spool) as file:
            for piece in pieces(index):
                contents = [data.read(index.content_length(frame)) for frame in range(piece.first, piece.last)]
                if sum(map(len, contents)) != sum(map(index.content_length, range(piece.first, piece.last))):
                    return False
                encoded = encode_frames(contents)
                if any(entry != index.frames[piece.first + at] for at, (_, entry) in enumerate(encoded)):
                    return False
                file.writelines(stored for stored, _ in encoded)
                self._read(piece.size)
            file.flush()
            self._store.put_file(layout.pack_key(pack_id), Path(file.name))
        return True

    # Removal

    def _is_sound(self, fault: Fault) -> bool:
        """Whether what was wrong with a pack is so no more."""
        try:
            index, size = self._index(fault.name), self._store.head(fault.key).size
            wanted = sum(1 << frame for frame in fault.frames)
            return size == index.stored_size and not bad_frames(
                self._store, fault.name, index, Pace(None), self._read, wanted=wanted
            )
        except (NotFoundError, DamagedError, UnsupportedError):
            return False

    def _remove(self, faults: list[Fault]) -> None:
        """Remove packs that cannot be repaired, as a collector would, but for those that a push relies on right now."""
        if not faults:
            return
        turn = Turn(self._store, lease=self._lease)
        try:
            turn.take()
            turn.say([fault.key for fault in faults])
            protected = {key for _, record in read_pushes(self._store) if record is not None for key in record.keys}
            todo = [fault for fault in faults if fault.key not in protected]
            # Since they were checked, hours ago perhaps, a push may have healed them. None can from now on: it would wait.
            for fault in todo:
                if self._is_sound(fault):
                    fault.repair, fault.repaired = HEALED, True
            todo = [fault for fault in todo if not fault.repaired]
            try:
                self._catalog.index.remove_packs([fault.name for fault in todo])
            except UnavailableError as error:
                _log.warning("%s; it is told by the next push", error)
            for fault in todo:
                for key in objects_of(fault.key):
                    turn.check()
                    self._store.delete(key)
                fault.repair = REMOVED
        finally:
            turn.release()
