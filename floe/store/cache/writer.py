"""The one process that changes cached packs: stores verified frames, evicts, and says when a pack is complete.

Locks, in the order they are taken: `_load_lock` (who loads a pack), `_room` (who evicts), a pack's flock (pins), a
pack's `lock` (its bits and data), then `Usage.lock` or one of the small ones that guard a table of this module.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue

from cachetools import LRUCache

from floe.store.cache.cached_pack import NO_DESCRIPTORS, CachedPack, Usage
from floe.store.cache.durable import current_boot_id
from floe.store.cache.eviction import EXTENT, batch, oldest_first, shortage
from floe.store.cache.load import load_pack
from floe.store.cache.node_cache import NodeCache, disk_errors
from floe.store.cache.ownership import leave_packs, own, remove_left
from floe.store.errors import DamagedError, FloeError, TransitDamageError
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import is_hexdigest

_log = logging.getLogger(__name__)

_TABLES = 16 << 20  # bytes of frame tables kept in memory
_OPEN_PACKS = 384  # packs with open files, two or three each
_WARN_PAUSE = 60.0  # seconds between two log lines about a disk that refuses writes
_PAUSE = 0.2  # seconds without storing or evicting after there was nothing to evict


class CacheWriter:
    """Frames of `cache` for the pack filesystem's worker. Thread-safe; no disk error leaves `put`.

    Waits up to `wait` seconds for the writer before it (a worker that is ending), then BusyError. `boot_id` is for tests.
    """

    def __init__(self, cache: NodeCache, *, wait: float = 0.0, boot_id: str | None = None) -> None:
        self.cache = cache
        self._boot_id = boot_id or current_boot_id()
        lock = own(cache.root / "writer.lock", wait)
        self._lock_fd = lock.fd
        try:
            leave_packs(cache, lock)
        except BaseException:
            os.close(lock.fd)
            raise
        remove_left(cache)
        self._usage = Usage()
        self.packs: dict[str, CachedPack] = {}  # those in use; others only look up
        self._tables_lock = threading.Lock()
        self._tables: LRUCache[str, FrameTable] = LRUCache(_TABLES, getsizeof=lambda t: 512 + 48 * len(t))
        self._open: LRUCache[str, CachedPack] = _OpenPacks(_OPEN_PACKS)
        self._open_lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._room = threading.Lock()
        self._idle_until = 0.0
        self._warn_from = 0.0
        self._counts = dict.fromkeys(
            ("stored_frames", "stored_bytes", "evicted_bytes", "bypassed_frames", "write_errors", "damaged_frames"), 0
        )
        self._counts_lock = threading.Lock()
        self._finishing: SimpleQueue[CachedPack | None] = SimpleQueue()
        self._load()
        self._finisher = threading.Thread(target=self._finish_packs, name="floe-cache-sync", daemon=True)
        self._finisher.start()

    # reading

    def pack(self, pack_id: str) -> CachedPack | None:
        """The pack's frames; None when its index is not on this node. No network; no error for a failing disk."""
        found = self.packs.get(pack_id)
        if found is not None:
            return found
        if not is_hexdigest(pack_id):
            return None
        try:
            if self.cache.content_size(pack_id) is None:
                return None
            with self._load_lock:
                if pack_id not in self.packs:
                    self.packs[pack_id] = self._load_pack(pack_id)
                return self.packs[pack_id]
        except FloeError as error:
            self._count("write_errors")
            _log.warning("cannot use the cache for pack %s: %s", pack_id, error)
            return None

    def table(self, pack_id: str) -> FrameTable | None:
        """The pack's frames as its index lists them; None when the index is not on this node."""
        with self._tables_lock:
            table = self._tables.get(pack_id)
        if table is None:
            index = self.cache.index(pack_id)
            if index is None:
                return None
            table = FrameTable(index)
            with self._tables_lock:
                self._tables[pack_id] = table
        return table

    def has(self, pack_id: str, frame: int) -> bool:
        """Whether this frame can be read without hashing or fetching it."""
        pack = self.pack(pack_id)
        return pack is not None and pack.bits.is_trusted(frame)

    def recheck(self, pack_id: str, frame: int) -> VerifiedFrame | None:
        """A frame that an unclean stop left behind, hashed; None when it is absent or damaged (and is now absent)."""
        pack, table = self.pack(pack_id), self.table(pack_id)
        if pack is None or table is None or not pack.bits.is_suspect(frame):
            return None
        generation = pack.generation
        try:
            content = os.pread(pack.open().data, table.content_length(frame), frame * table.frame_size)
            verified = VerifiedFrame(content, table.entry(frame).digest)
        except (OSError, TransitDamageError) as error:
            if isinstance(error, OSError) and error.errno in NO_DESCRIPTORS:
                self._failed(pack_id, error)
                return None
            self._count("damaged_frames")
            _log.warning(
                "frame %d of pack %s in the cache is not usable, it is fetched again: %s", frame, pack_id, error
            )
            pack.forget(frame)
            return None
        try:
            pack.trust(frame, generation, self._boot_id)
        except OSError as error:
            self._failed(pack_id, error)
        if pack.bits.is_full():
            self._finishing.put(pack)
        return verified

    # writing

    def put(self, pack_id: str, frame: int, content: VerifiedFrame) -> bool:
        """Keep a frame; False when it could not be kept (no room, a failing disk), which harms nobody.

        DamagedError when `content` is another frame's.
        """
        return self.put_run(pack_id, frame, [content])

    def put_run(self, pack_id: str, first: int, frames: Sequence[VerifiedFrame], *, direct: bool = False) -> bool:
        """Keep adjacent frames from number `first` on, all or none; see `put`.

        `direct`: past the page cache, since their readers have them already.
        """
        try:
            pack, table = self.pack(pack_id), self.table(pack_id)
        except FloeError as error:
            self._failed(pack_id, error)
            pack = table = None
        if pack is None or table is None:
            return False
        numbers = range(first, first + len(frames))
        for number, frame in zip(numbers, frames, strict=True):
            if table.entry(number).digest != frame.digest:
                raise DamagedError(f"this is not frame {number} of pack {pack_id}")
        if all(map(pack.bits.is_trusted, numbers)):
            return True
        need = sum(map(table.content_length, numbers))
        contents = [frame.content for frame in frames]
        for attempt in (1, 2):
            if not self._reserve(need, full=attempt == 2):
                break
            try:
                pack.store(first, contents, self._boot_id, reserved=need, direct=direct)
            except OSError as error:
                self._failed(pack_id, error)
                continue
            self._count("stored_frames", len(frames))
            self._count("stored_bytes", need)
            if pack.bits.is_full():
                self._finishing.put(pack)
            return True
        self._count("bypassed_frames", len(frames))
        return False

    def let_go(self, pack_id: str, start: int, stop: int) -> None:
        """Content bytes [start, stop) were read by a stream: the page cache may use their memory for others.

        What is on its way to the disk stays until it is there.
        """
        pack = self.packs.get(pack_id)
        if pack is not None:
            with suppress(OSError):
                pack.let_go(start, stop)

    def _failed(self, pack_id: str, error: OSError | FloeError) -> None:
        self._count("write_errors")
        if time.monotonic() >= self._warn_from:  # a full disk fails every store
            self._warn_from = time.monotonic() + _WARN_PAUSE
            _log.warning("cannot write pack %s to the cache: %s (counted, not said again)", pack_id, str(error))

    def _count(self, name: str, by: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += by

    def counters(self) -> dict[str, int]:
        """Totals since the start: frames and bytes; and `held_bytes`, the content in the cache now."""
        with self._counts_lock:
            return {**self._counts, "held_bytes": self._usage.held, "read_errors": self._usage.errors}

    # room

    def _reserve(self, need: int, *, full: bool) -> bool:
        """Count `need` bytes as held, after evicting what that takes. `full`: the disk just said so."""
        with self._room:
            short = self._short(need)
            if full:
                short = max(short, need)
            if short > 0:
                if time.monotonic() < self._idle_until:
                    return False
                self._evict(batch(short, self.cache.size))
                if self._short(need) > 0:
                    self._idle_until = time.monotonic() + _PAUSE
                    return False
            self._usage.add(need)
        return True

    def _short(self, need: int) -> int:
        free = None
        if self.cache.min_free:
            try:
                status = os.statvfs(self.cache.packs)
            except OSError:
                return 0  # then writing fails too, and says why
            free = status.f_bavail * status.f_frsize
        return shortage(need, self._usage.held, self.cache.size, free, self.cache.min_free)

    def _evict(self, target: int) -> int:
        """Take away at least `target` bytes of what was not used for longest, if there is so much; what went."""
        packs = list(self.packs.values())
        pinned: dict[int, bool] = {}
        chosen: dict[int, list[int]] = {}
        freed = planned = 0
        for position, extent in oldest_first([p.recency for p in packs]):
            pack = packs[position]
            if position not in pinned:
                pinned[position] = self._is_pinned(pack.id)
            if pinned[position]:
                continue
            per_extent = EXTENT // pack.bits.frame_size
            frames = pack.bits.present(extent * per_extent, (extent + 1) * per_extent)
            chosen.setdefault(position, []).extend(frames)
            planned += sum(map(pack.bits.content_length, frames))
            if planned >= target - freed:
                freed += sum(self._drop(packs[at], going) for at, going in chosen.items())
                chosen, planned = {}, 0
                if freed >= target:
                    break
        freed += sum(self._drop(packs[at], going) for at, going in chosen.items())
        self._count("evicted_bytes", freed)
        return freed

    def _is_pinned(self, pack_id: str) -> bool:
        try:
            return bool(self.cache.pins(pack_id))
        except OSError as error:  # such as too many open files: nobody knows, so nothing goes
            self._failed(pack_id, error)
            return True

    def _drop(self, pack: CachedPack, frames: list[int]) -> int:
        try:
            with self.cache.locked(pack.id, wait=False):
                if self.cache.pins(pack.id):
                    return 0
                return pack.drop(frames, self._boot_id)
        except BlockingIOError:
            return 0  # somebody pins it right now
        except (OSError, FloeError) as error:
            self._count("write_errors")
            _log.warning("cannot evict from pack %s in the cache: %s", pack.id, error)
            return 0

    # completing

    def _finish_packs(self) -> None:
        while True:
            pack = self._finishing.get()
            if pack is None:
                return
            if pack.complete or not pack.bits.is_full():
                continue
            try:
                pack.presync()
                with self.cache.locked(pack.id):
                    pack.finish()
            except (OSError, FloeError) as error:
                self._count("write_errors")
                _log.warning("pack %s in the cache cannot be completed: %s", pack.id, error)
                pack.distrust(self._boot_id)

    def close(self) -> None:
        """Sync what was changed, so that the next boot may trust it, and let the next writer in."""
        self._finishing.put(None)
        self._finisher.join()
        for pack in sorted(self.packs.values(), key=CachedPack.last_use):
            try:
                pack.sync()
                pack.note_use()
            except OSError as error:
                self._failed(pack.id, error)
            pack.files = None
        os.close(self._lock_fd)

    # loading

    def _load(self) -> None:
        found = []
        for name in filter(is_hexdigest, os.listdir(self.cache.packs)):  # noqa: PTH208 - names only
            try:
                found.append(((self.cache.packs / name / "bitmap").stat().st_mtime_ns, name))
            except OSError:
                continue  # an index only
        for _, name in sorted(found):
            try:
                pack = self._load_pack(name)
            except FloeError as error:
                _log.warning("cannot use pack %s in the cache: %s", name, error)
                continue
            self.packs[name] = pack
            if not pack.complete and pack.bits.is_full():
                self._finishing.put(pack)

    def _load_pack(self, pack_id: str) -> CachedPack:
        with disk_errors(f"pack {pack_id} in {self.cache.root}"):
            return load_pack(self.cache, pack_id, self._usage, self._boot_id, self._opened)

    def _opened(self, pack: CachedPack) -> None:
        with self._open_lock:
            self._open[pack.id] = pack


class _OpenPacks(LRUCache[str, CachedPack]):
    """Packs with open files; the one that goes closes them once no thread uses them any more."""

    def popitem(self) -> tuple[str, CachedPack]:
        key, pack = super().popitem()
        pack.files = None
        return key, pack
