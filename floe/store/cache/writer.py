"""The one process that changes cached packs: stores verified frames, evicts, and says when a pack is complete.

Locks, in the order they are taken: `_load_lock` (who loads a pack), the evictor's `_room`, a pack's flock (pins), a
pack's `lock` (its bits and data), then `Usage.lock` or one of the small ones that guard a table of this module.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from cachetools import LRUCache

from floe.store.cache.bypass import Bypass
from floe.store.cache.cached_pack import CachedPack, NotKeptError
from floe.store.cache.durable import current_boot_id
from floe.store.cache.evictor import Evictor
from floe.store.cache.load import load_pack
from floe.store.cache.node_cache import NodeCache, disk_errors
from floe.store.cache.ownership import leave_packs, own, release, remove_left
from floe.store.cache.shares import Room, Share, Shares, is_no_mount
from floe.store.cache.tables import Tables
from floe.store.cache.usage import Usage
from floe.store.errors import DamagedError, FloeError, TransitDamageError
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import Buffer, is_hexdigest
from floe.store.process import NO_DESCRIPTORS

_log = logging.getLogger(__name__)

_OPEN_PACKS = 384  # packs with open files, two or three each
_WARN_PAUSE = 60.0  # seconds between two log lines about a disk that refuses writes
_COUNTED = ("stored_frames", "stored_bytes", "evicted_bytes", "bypassed_frames", "write_errors", "damaged_frames")
COUNTERS = (*_COUNTED, "held_bytes", "read_errors")


class Group(NamedTuple):
    """What the writer of one directory of several has to do with the others.

    `packs`, `tables` and `shares` are those of all. `evict_elsewhere` is asked for bytes of a share that lie in other directories,
    `trouble` told that the disk refused something.
    """

    packs: Mapping[str, CachedPack]
    tables: Tables
    shares: Shares
    evict_elsewhere: Callable[[int, Share], object]
    trouble: Callable[[], None]


class CacheWriter:
    """Frames of `cache`, one directory, for the pack filesystem's worker. Thread-safe; no disk error leaves `put`.

    Waits up to `wait` seconds for the writer before it (a worker that is ending), then BusyError. `bypass` judges the disk.
    `group`: the other directories, if there are. `boot_id` is for tests.
    """

    def __init__(
        self,
        cache: NodeCache,
        *,
        wait: float = 0.0,
        boot_id: str | None = None,
        bypass: Bypass | None = None,
        group: Group | None = None,
    ) -> None:
        self.cache = cache
        self._boot_id = boot_id or current_boot_id()
        lock = own(cache.root / "writer.lock", wait)
        self._lock_fd = lock.fd
        try:
            leave_packs(cache, lock)
        except BaseException:
            release(lock.fd)
            raise
        remove_left(cache)
        self.packs: dict[str, CachedPack] = {}  # those in use; others only look up
        self._group = group or Group(self.packs, Tables(cache.index), Shares(), lambda _need, _share: 0, lambda: None)
        self.shares = self._group.shares
        self._tables = self._group.tables
        self.bypass = bypass or Bypass()
        self._usage = Usage(self.bypass, self._group.trouble)
        self._open: LRUCache[str, CachedPack] = _OpenPacks(_OPEN_PACKS)
        self._open_lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._warn_from = 0.0
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._counts_lock = threading.Lock()
        self._evictor = Evictor(
            cache,
            self.packs,
            self._usage,
            self._group,
            boot_id=self._boot_id,
            failed=self._failed,
            evicted=lambda nbytes: self._count("evicted_bytes", nbytes),
        )
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
            self._failed(pack_id, error, "use the cache for")
            return None

    def table(self, pack_id: str) -> FrameTable | None:
        """The pack's frames as its index lists them; None when the index is not on this node."""
        return self._tables.get(pack_id)

    def learn(self, pack_id: str, data: Buffer) -> FrameTable:
        """The index object of a pack that is no longer on this node, out of the store; see Tables."""
        return self._tables.learn(pack_id, data, self.cache.add_index)

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
                "frame %d of pack %s in the cache is not usable, it is fetched again: %s", frame, pack_id, str(error)
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

    def put_run(
        self,
        pack_id: str,
        first: int,
        frames: Sequence[VerifiedFrame],
        *,
        direct: bool = False,
        unread: bool = False,
    ) -> bool:
        """Keep adjacent frames from number `first` on, all or none; see `put`.

        `direct`: past the page cache, since their readers have them already. `unread`: nobody asked for them, so nothing is
        evicted for them, and they are the first to go.
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
            if not self._evictor.reserve(pack_id, need, full=attempt == 2, evict=not unread):
                break
            try:
                pack.store(first, contents, self._boot_id, reserved=need, direct=direct, unread=unread)
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

    def missed(self, nbytes: int, seconds: float) -> None:
        """A read of `nbytes` waited so long for the store."""
        self.bypass.misses.add(nbytes, seconds)
        self.bypass.look()

    def discard(self, pack_id: str, frames: list[int]) -> bool:
        """Take away frames that are known to be bad; False when a native mount has the pack, or the disk fails.

        Waits for whoever pins or completes the pack just then.
        """
        pack = self.pack(pack_id)
        return pack is not None and self._evictor.drop(pack, frames, is_no_mount, wait=True) > 0

    def _failed(self, pack_id: str, error: OSError | FloeError, what: str = "write") -> None:
        self._count("write_errors")
        if time.monotonic() >= self._warn_from:  # a full disk fails every store
            self._warn_from = time.monotonic() + _WARN_PAUSE
            to = " to the cache" if what == "write" else ""
            _log.warning("cannot %s pack %s%s: %s (counted, not said again)", what, pack_id, to, str(error))

    def _count(self, name: str, by: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += by
        if name == "write_errors":
            self._group.trouble()

    def counters(self) -> dict[str, int]:
        """Totals since the start: frames and bytes; and `held_bytes`, the content in the cache now."""
        with self._counts_lock:
            return {**self._counts, "held_bytes": self._usage.held, "read_errors": self._usage.errors}

    # room

    def room(self, pack_id: str = "") -> Room:
        """See Evictor.room."""
        return self._evictor.room(pack_id)

    def evict(self, target: int, among: Share | None = None) -> int:
        """See Evictor.evict."""
        return self._evictor.evict(target, among)

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
            except NotKeptError as error:
                self._lost(pack, error)
            except (OSError, FloeError) as error:
                self._count("write_errors")
                _log.warning("pack %s in the cache cannot be completed: %s", pack.id, str(error))
                pack.distrust(self._boot_id)

    def _lost(self, pack: CachedPack, error: NotKeptError) -> None:
        self._count("write_errors")
        _log.warning("pack %s in the cache was not kept by the disk, and is fetched again: %s", pack.id, str(error))
        pack.lose(self._boot_id)

    def close(self) -> None:
        """Sync what was changed, so that the next boot may trust it, and let the next writer in."""
        self._finishing.put(None)
        self._finisher.join()
        for pack in sorted(self.packs.values(), key=CachedPack.last_use):
            try:
                pack.sync()
                pack.note_use()
            except NotKeptError as error:
                self._lost(pack, error)
            except OSError as error:
                self._failed(pack.id, error)
            pack.files = None
        release(self._lock_fd)

    def abandon(self) -> None:
        """Write nothing more, to a disk that failed and may not answer; in place of `close`."""
        self._finishing.put(None)
        for pack in self.packs.values():
            pack.files = None
        release(self._lock_fd)

    def disks(self) -> list[dict[str, Any]]:
        """For each directory its `path`, `state` ("ok"), `problem`, `held_bytes` and what `bypass` says."""
        path, held = str(self.cache.root), self._usage.held
        return [{"path": path, "state": "ok", "problem": "", "held_bytes": held, "bypass": self.bypass.status()}]

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
