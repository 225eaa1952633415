"""Whether a stored object is what its name says; packs down to every frame, as they are read, in pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from floe.store import layout
from floe.store.errors import DamagedError, NotFoundError, TransitDamageError
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.packindex import PackIndex
from floe.store.packpieces import Piece, pieces


class Pace:
    """Holds readers to `rate` bytes a second together; None: as fast as they can. Thread-safe."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = 0.0  # time.monotonic() from which on the next may begin

    def wait(self, nbytes: int) -> None:
        """Wait until `nbytes` more may be read."""
        if not self._rate:
            return
        with self._lock:
            begin = max(self._free, time.monotonic())
            self._free = begin + nbytes / self._rate
        time.sleep(max(0.0, begin - time.monotonic()))


def bad_frames(
    store: ObjectStore,
    pack_id: str,
    index: PackIndex,
    pace: Pace,
    read: Callable[[int], object],
    *,
    keep: Callable[[Piece, Buffer], None] | None = None,
    wanted: int | None = None,
) -> list[int]:
    """Numbers of the frames of a pack that are not what its index says, each read twice. Holds some 10 MiB.

    `read` is told how many bytes were; `keep` gets the pieces that are sound. `wanted`: frame N counts if bit N
    is set, and pieces without any are not read; None: all. NotFoundError: there is no such pack.
    """
    bad: list[int] = []
    for piece in pieces(index):
        if wanted is not None and not wanted >> piece.first & (1 << piece.last - piece.first) - 1:
            continue
        pace.wait(piece.size)
        data, wrong = _read_piece(store, pack_id, index, piece)
        if wrong:  # what was damaged on its way arrives whole now
            data, wrong = _read_piece(store, pack_id, index, piece)
        bad += wrong if wanted is None else [frame for frame in wrong if wanted >> frame & 1]
        if keep is not None and not wrong and data is not None:
            keep(piece, data)
        read(piece.size)
    return bad


def _read_piece(store: ObjectStore, pack_id: str, index: PackIndex, piece: Piece) -> tuple[Buffer | None, list[int]]:
    try:
        data = store.get(layout.pack_key(pack_id), piece.start, piece.size)
    except NotFoundError:
        raise
    except (DamagedError, TransitDamageError):  # the object is too short
        return None, list(range(piece.first, piece.last))
    return data, piece.wrong(index, data)
