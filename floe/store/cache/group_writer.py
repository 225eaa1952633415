"""The writer of several cache directories: a CacheWriter for each, and the packs of all.

A directory that fails (its disk refuses what it must not, or its folder is gone) is left out until this process ends. Whether it does is
tried, by writing a small file, when an operation was refused, and looked at every few seconds; a thread for each directory, since
a disk that failed may not answer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from floe.store.cache.bypass import Bypass, Costs
from floe.store.cache.cached_pack import CachedPack
from floe.store.cache.durable import sync_folder, write_all
from floe.store.cache.group import FOR_GOOD, CacheGroup
from floe.store.cache.node_cache import FULL, NodeCache
from floe.store.cache.shares import Room, Share, Shares
from floe.store.cache.tables import Tables
from floe.store.cache.writer import COUNTERS, CacheWriter, Group
from floe.store.errors import BusyError, FloeError
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import Buffer
from floe.store.policy import NEVER
from floe.store.process import NO_DESCRIPTORS

_log = logging.getLogger(__name__)
_LOOK = 10.0  # seconds between two looks at a directory that nobody complained of
_PAUSE = 1.0  # seconds between two trials of one that somebody did
_TRIAL = bytes(4096)


class GroupWriter:
    """Used as a CacheWriter is, and like it but for what `cache` is. Thread-safe.

    BusyError when another process writes to one of the directories. One that fails is left out; with none left all is read from the store.
    """

    def __init__(
        self, cache: CacheGroup, *, wait: float = 0.0, boot_id: str | None = None, bypass: str = NEVER
    ) -> None:
        self.cache = cache
        self.shares = Shares()
        self.packs: dict[str, CachedPack] = {}  # of the directories in use
        self._tables = Tables(cache.index)
        self._misses = Costs()
        self._lock = threading.Lock()  # guards the next four, and what is put into `packs`
        self._writers: dict[Path, CacheWriter] = {}
        self._abandoned: list[CacheWriter] = []
        self._out = dict(cache.missing)  # and why
        self._full: set[Path] = set()
        self._troubled = {root: threading.Event() for root in cache.roots}
        self._stopping = threading.Event()
        self._restore_from = 0.0
        for member in cache.members:
            if member.root in cache.missing:
                cache.leave_out(member.root, cache.missing[member.root], FOR_GOOD)
                continue
            try:
                self._writers[member.root] = self._open(member, wait, boot_id, bypass)
            except BusyError:
                self._close_all()
                raise
            except (FloeError, OSError) as error:
                self._out[member.root] = str(error)
                cache.leave_out(member.root, str(error), FOR_GOOD)
        self._tell_shared_disks()
        for pack_id in sorted(set().union(*(writer.packs for writer in self._writers.values()))):
            self.pack(pack_id)
        self._copying = threading.Thread(target=self._copy_indexes, name="floe-cache-copies", daemon=True)
        self._threads = [self._copying] + [
            threading.Thread(target=self._watch, args=(root,), name="floe-cache-watch", daemon=True)
            for root in self._writers
        ]
        for thread in self._threads:
            thread.start()

    def _open(self, member: NodeCache, wait: float, boot_id: str | None, bypass: str) -> CacheWriter:
        root = member.root

        def evict_elsewhere(need: int, share: Share) -> None:
            self._evict_elsewhere(root, need, share)

        group = Group(self.packs, self._tables, self.shares, evict_elsewhere, self._troubled[root].set)
        judge = Bypass(bypass, str(root), self._misses)
        return CacheWriter(member, wait=wait, boot_id=boot_id, bypass=judge, group=group)

    def _tell_shared_disks(self) -> None:
        by_disk: dict[int, Path] = {}
        for root in self._writers:
            other = by_disk.setdefault(root.stat().st_dev, root)
            if other != root:
                _log.warning("cache directories %s and %s lie on one disk: that makes nothing faster", other, root)

    # where packs lie

    def pack(self, pack_id: str) -> CachedPack | None:
        """See CacheWriter."""
        found = self.packs.get(pack_id)
        if found is not None:
            return found
        if not self._writers:
            return None
        try:
            home = self._loaded(pack_id) or self.cache.settle(pack_id) or self._restore(pack_id)
        except FloeError as error:  # not a pack's id, or no disk that takes it
            _log.debug("pack %s has no place in the cache: %s", pack_id, error)
            return None
        writer = self._writers.get(home.root) if home is not None else None
        found = writer.pack(pack_id) if writer is not None else None
        if found is not None:
            with self._lock:
                if self._writers.get(found.folder.parent.parent) is writer:
                    found = self.packs.setdefault(pack_id, found)
        return found

    def _loaded(self, pack_id: str) -> NodeCache | None:
        """The home of a pack that its writer has loaded, index and all, so that no index need be parsed for it."""
        home = self.cache.home(pack_id)
        writer = self._writers.get(home.root)
        if writer is not None and pack_id in writer.packs:
            with suppress(OSError):
                return home if (home.folder(pack_id) / "index").exists() else None
        return None

    def _restore(self, pack_id: str) -> NodeCache | None:
        """The home of a pack whose index is on no disk any more, but in memory, from where it is put on one again."""
        table = self._tables.known(pack_id)
        if table is None or time.monotonic() < self._restore_from:
            return None
        try:
            self.cache.add_index(pack_id, table.encode())
        except FloeError:
            self._restore_from = time.monotonic() + _LOOK  # not for each frame that is looked up
            raise
        return self.cache.settle(pack_id)

    def _copy_indexes(self) -> None:
        """Have every index in two directories, also after one was lost or came empty."""
        with suppress(FloeError):
            for pack_id in self.cache.pack_ids():
                if self._stopping.is_set():
                    return
                self.cache.copy_index(pack_id)

    def _of(self, pack_id: str) -> CacheWriter | None:
        """The writer of the directory that a pack lies in."""
        pack = self.pack(pack_id)
        return None if pack is None else self._writers.get(pack.folder.parent.parent)

    def table(self, pack_id: str) -> FrameTable | None:
        """See CacheWriter. What is in memory outlives the directory that it came from."""
        return self._tables.get(pack_id)

    def learn(self, pack_id: str, data: Buffer) -> FrameTable:
        """See CacheWriter."""
        return self._tables.learn(pack_id, data, self.cache.add_index)

    # reading and writing

    def has(self, pack_id: str, frame: int) -> bool:
        """See CacheWriter."""
        pack = self.pack(pack_id)
        return pack is not None and pack.bits.is_trusted(frame)

    def recheck(self, pack_id: str, frame: int) -> VerifiedFrame | None:
        """See CacheWriter."""
        writer = self._of(pack_id)
        return None if writer is None else writer.recheck(pack_id, frame)

    def put(self, pack_id: str, frame: int, content: VerifiedFrame) -> bool:
        """See CacheWriter."""
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
        """See CacheWriter."""
        writer = self._of(pack_id)
        return writer is not None and writer.put_run(pack_id, first, frames, direct=direct, unread=unread)

    def let_go(self, pack_id: str, start: int, stop: int) -> None:
        """See CacheWriter."""
        pack = self.packs.get(pack_id)
        if pack is not None:
            with suppress(OSError):
                pack.let_go(start, stop)

    def discard(self, pack_id: str, frames: list[int]) -> bool:
        """See CacheWriter."""
        writer = self._of(pack_id)
        return writer is not None and writer.discard(pack_id, frames)

    def missed(self, nbytes: int, seconds: float) -> None:
        """See CacheWriter."""
        self._misses.add(nbytes, seconds)
        for writer in list(self._writers.values()):
            writer.bypass.look()

    # room

    def room(self, pack_id: str = "") -> Room:
        """See CacheWriter: in the directory that the pack lies in, or without one in all together."""
        writer = self._of(pack_id) if pack_id else None
        if writer is not None:
            return writer.room(pack_id)
        rooms = [writer.room() for writer in list(self._writers.values())]
        if not rooms:
            return Room(0, None)
        sizes = [room.size for room in rooms if room.size is not None]
        return Room(sum(room.free for room in rooms), sum(sizes) if len(sizes) == len(rooms) else None)

    def evict(self, target: int, among: Share | None = None) -> int:
        """See CacheWriter: from the directories one after the other."""
        return _evict(self._writers.values(), target, among)

    def _evict_elsewhere(self, root: Path, need: int, share: Share) -> None:
        """Make room in a model's share for what comes to the directory `root`, which has no more of the model to give."""
        _evict((writer for other, writer in list(self._writers.items()) if other != root), need, share)

    # directories that fail

    def _watch(self, root: Path) -> None:
        troubled = self._troubled[root]
        while not self._stopping.is_set():
            told = troubled.wait(_LOOK)
            troubled.clear()
            if self._stopping.is_set():
                return
            try:
                self._try(root, write=told or root in self._full)
            except OSError as error:
                self._leave_out(root, error.strerror or str(error))
                return
            if told:
                self._stopping.wait(_PAUSE)

    def _try(self, root: Path, *, write: bool) -> None:
        """OSError when the directory cannot be used any more. A full disk still holds what it holds."""
        place = self._writers[root].cache.spare
        if not write:
            place.stat()
            return
        trial = place / f"trial-{os.getpid()}"
        try:
            fd = os.open(trial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, _TRIAL, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
                trial.unlink(missing_ok=True)  # a sweep takes it for a dead process's when the disk is that slow
            sync_folder(place)
        except OSError as error:
            if error.errno in FULL:
                self._full.add(root)
            elif error.errno not in NO_DESCRIPTORS:
                raise
        else:
            self._full.discard(root)

    def _leave_out(self, root: Path, why: str) -> None:
        with self._lock:
            writer = self._writers.pop(root, None)
            if writer is None or self._stopping.is_set():
                return
            self._out[root] = why
            self._abandoned.append(writer)
            self.cache.leave_out(root, why, FOR_GOOD)
            for pack_id, pack in list(self.packs.items()):
                if pack.folder.parent.parent == root:
                    del self.packs[pack_id]
        self._copy_indexes()

    # all of them

    def counters(self) -> dict[str, int]:
        """See CacheWriter: sums."""
        counted = [writer.counters() for writer in (*self._writers.values(), *self._abandoned)]
        return {name: sum(counts[name] for counts in counted) for name in COUNTERS}

    def disks(self) -> list[dict[str, Any]]:
        """See CacheWriter; `state` may also be "full" (it takes no new packs) or "left out", for `problem`."""
        found = []
        with self._lock:  # what is called left out has no packs any more
            writers = dict(self._writers)
        for root in dict.fromkeys((*self.cache.roots, *self.cache.missing)):
            writer = writers.get(root)
            if writer is None:
                found.append(
                    {"path": str(root), "state": "left out", "problem": self._out.get(root, ""), "held_bytes": 0}
                )
            else:
                found += writer.disks()
                if root in self._full:
                    found[-1]["state"] = "full"
        return found

    def close(self) -> None:
        """See CacheWriter."""
        self._stopping.set()
        for event in self._troubled.values():
            event.set()
        until = time.monotonic() + _PAUSE  # a disk may not answer
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        self._close_all()

    def _close_all(self) -> None:
        with self._lock:
            writers, self._writers = list(self._writers.values()), {}
        for writer in writers:
            writer.close()
        for writer in self._abandoned:
            writer.abandon()


def _evict(writers: Iterable[CacheWriter], target: int, among: Share | None) -> int:
    freed = 0
    for writer in list(writers):
        if freed < target:
            freed += writer.evict(target - freed, among)
    return freed
