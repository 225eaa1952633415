"""Several cache directories as one node cache: each pack lies in one of them, trees in the first that works.

Where a pack lies is found out by looking, so a directory put into or taken out of the list changes no place but of
what is new or lay in it; where it does not lie anywhere yet, placing.py says which directory it belongs to. A pack's index, of
which nobody would know anything without, lies in two directories.

A directory that fails is left out, here for a minute and in the writer (group_writer.py) for good: its packs are absent then.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from floe.store.cache.node_cache import NodeCache
from floe.store.cache.placing import ranked
from floe.store.errors import DiskError, FloeError, NoSpaceError
from floe.store.ids import Buffer, check_hexdigest
from floe.store.packindex import PackIndex
from floe.store.process import NO_DESCRIPTORS

_log = logging.getLogger(__name__)
_AGAIN = 60.0  # seconds until a directory that failed is tried again
_SPACE = 16 << 20  # free bytes: a disk with less takes no new packs
FOR_GOOD = math.inf  # seconds
T = TypeVar("T")


class CacheGroup:
    """`members`, each with bounds of its own; used as a NodeCache is. Thread-safe.

    `root` is the first one's. `size` and `min_free` are sums, `size` None when one has no bound. `missing`: directories that should
    be members and cannot, and why; when no directory can, all are both.
    """

    def __init__(self, members: Sequence[NodeCache], missing: Mapping[Path, str] | None = None) -> None:
        self.members = tuple(members)
        self.missing = dict(missing or {})
        self.root = members[0].root
        self.roots = tuple(member.root for member in members)
        sizes = [member.size for member in members]
        self.size = None if None in sizes else sum(size for size in sizes if size is not None)
        self.min_free = sum(member.min_free for member in members)
        self._by_name = {str(member.root): member for member in members}
        self._weights = {
            str(member.root): 1 if member.root in self.missing else capacity(member.root) for member in members
        }
        self._out: dict[Path, tuple[float, str]] = {}  # until when, and why
        self._lock = threading.Lock()

    # directories

    def usable(self) -> list[NodeCache]:
        """Those that are not left out now, in order. All of them when nothing is left, so that the error tells why."""
        now = time.monotonic()
        with self._lock:
            out = {root for root, (until, _) in self._out.items() if until > now}
        return [member for member in self.members if member.root not in out] or list(self.members)

    def leave_out(self, root: Path, why: str, seconds: float = _AGAIN) -> None:
        """Do without a directory for so long."""
        with self._lock:
            known = self._out.get(root, (0.0, ""))
            self._out[root] = (max(known[0], time.monotonic() + seconds), why)
        if known[0] < time.monotonic():
            _log.error("cache directory %s is left out: %s; its packs are read from the store", root, why)

    def home(self, pack_id: str, full: Collection[Path] = ()) -> NodeCache:
        """Where a pack lies, or belongs: a complete copy before others, and what belongs there before what was left over.

        In none of the directories `full`, of which some other must be usable.
        """
        names = ranked(check_hexdigest(pack_id, "pack id"), self._weights)
        usable = self.usable()
        order = [member for name in names if (member := self._by_name[name]) in usable and member.root not in full]
        here = [member for member in order if self._has(member, pack_id, "data")]
        for member in here:
            if len(here) == 1 or self._has(member, pack_id, "complete"):
                return member
        return here[0] if here else next((m for m in order if not _is_full(m.root)), order[0])

    def settle(self, pack_id: str) -> NodeCache | None:
        """The pack's home, with its index in place; None when no directory has the index."""
        home, known = self._at_home(pack_id, lambda home: self._bring_index(home, pack_id))
        return home if known else None

    def _bring_index(self, home: NodeCache, pack_id: str) -> bool:
        """Have the pack's index in a directory; False when none has it."""
        if home.content_size(pack_id) is None:
            index = self.index(pack_id)
            if index is None:
                return False
            home.add_index(pack_id, index.encode())
        return True

    def _at_home(self, pack_id: str, call: Callable[[NodeCache], T]) -> tuple[NodeCache, T]:
        """Do something where a pack lies. A directory that fails in it is left out, and the next one tried."""
        problem: FloeError | None = None
        full: set[Path] = set()
        for _ in self.members:
            home = self.home(pack_id, full)
            try:
                return home, call(home)
            except NoSpaceError as error:
                problem = problem or error
                full.add(home.root)
                # What lies in a full directory stays there: a pin elsewhere would hold nothing.
                if self._has(home, pack_id, "data") or full.issuperset(member.root for member in self.usable()):
                    break
            except DiskError as error:
                problem = problem or error
                if not self._failed(home, error):
                    break
        assert problem is not None
        raise problem

    def _failed(self, member: NodeCache, error: FloeError | OSError) -> bool:
        """Leave a directory out, if it is its disk that failed, and not this process that has no descriptors to spare."""
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in NO_DESCRIPTORS:
            return False
        self.leave_out(member.root, str(error))
        return True

    def _has(self, member: NodeCache, pack_id: str, name: str) -> bool:
        try:
            os.stat(member.packs / pack_id / name)  # noqa: PTH116 - whose errors other than absence count
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            self.leave_out(member.root, str(error))
            return False
        return True

    def _try(self, member: NodeCache, call: Callable[[str], T], what: str) -> T | None:
        """Ask one directory; None when its disk fails, which leaves it out."""
        try:
            return call(what)
        except DiskError as error:
            self._failed(member, error)
            return None

    # trees

    def add_tree(self, tree_digest: str, image: Buffer) -> Path:
        """See NodeCache."""
        return self._in_first(lambda member: member.add_tree(tree_digest, image))

    def _in_first(self, call: Callable[[NodeCache], T]) -> T:
        problem: FloeError | None = None
        for member in self.usable():
            try:
                return call(member)
            except (DiskError, NoSpaceError) as error:
                problem = problem or error
                if isinstance(error, DiskError):
                    self._failed(member, error)
        assert problem is not None
        raise problem

    def tree_path(self, tree_digest: str) -> Path | None:
        """See NodeCache."""
        paths = (self._try(member, member.tree_path, tree_digest) for member in self.usable())
        return next((path for path in paths if path is not None), None)

    # packs

    def pack_ids(self) -> list[str]:
        """All packs of which anything is here."""
        found: set[str] = set()
        for member in self.usable():
            try:
                found.update(member.pack_ids())
            except OSError as error:
                self._failed(member, error)
        return sorted(found)

    def add_index(self, pack_id: str, data: Buffer) -> PackIndex:
        """See NodeCache. A copy goes to the next directory, for when the first one is lost."""
        home, index = self._at_home(pack_id, lambda member: member.add_index(pack_id, data))
        self._add_copy(pack_id, data, [home])
        return index

    def copy_index(self, pack_id: str) -> None:
        """Have a copy of an index that lies in one directory only, if another one takes it."""
        holders = [member for member in self.usable() if self._has(member, pack_id, "index")]
        if len(holders) == 1:
            index = self._try(holders[0], holders[0].index, pack_id)
            if index is not None:
                self._add_copy(pack_id, index.encode(), holders)

    def _add_copy(self, pack_id: str, data: Buffer, holders: Sequence[NodeCache]) -> None:
        usable = self.usable()
        for name in ranked(pack_id, self._weights):
            member = self._by_name[name]
            if member in holders or member not in usable or _is_full(member.root):
                continue
            try:
                member.add_index(pack_id, data)
                break
            except NoSpaceError:
                continue  # it holds what it holds
            except DiskError as error:
                self._failed(member, error)

    def index(self, pack_id: str) -> PackIndex | None:
        """See NodeCache."""
        found = (self._try(member, member.index, pack_id) for member in self.usable())
        return next((index for index in found if index is not None), None)

    def content_size(self, pack_id: str) -> int | None:
        """See NodeCache."""
        found = (self._try(member, member.content_size, pack_id) for member in self.usable())
        return next((size for size in found if size is not None), None)

    def data_path(self, pack_id: str) -> Path:
        """See NodeCache."""
        return self._at_home(pack_id, lambda home: self._data_in(home, pack_id))[1]

    def _data_in(self, home: NodeCache, pack_id: str) -> Path:
        self._bring_index(home, pack_id)
        return home.data_path(pack_id)

    def is_complete(self, pack_id: str) -> bool:
        """See NodeCache: of the copy that `data_path` names."""
        return self.home(pack_id).is_complete(pack_id)

    def folder(self, pack_id: str) -> Path:
        """Where a pack lies, or belongs."""
        return self.home(pack_id).folder(pack_id)

    # pins

    def pin(self, pack_id: str, owner: str, why: str = "") -> None:
        """See NodeCache. It decides where the pack lies, if nothing did."""

        def pin(home: NodeCache) -> None:
            self._data_in(home, pack_id)
            home.pin(pack_id, owner, why)

        self._at_home(pack_id, pin)

    def unpin(self, pack_id: str, owner: str) -> None:
        """See NodeCache: wherever it was pinned."""
        problem: FloeError | None = None
        for member in self.usable():
            try:
                member.unpin(pack_id, owner)
            except DiskError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def pin_reason(self, pack_id: str, owner: str) -> str:
        """See NodeCache: where there is one."""
        return next((why for member in self.usable() if (why := member.pin_reason(pack_id, owner))), "")

    def pins(self, pack_id: str) -> set[str]:
        """See NodeCache: those of all directories. OSError without descriptors: there may be more."""
        found: set[str] = set()
        for member in self.usable():
            try:
                found |= member.pins(pack_id)
            except OSError as error:
                if not self._failed(member, error):
                    raise
        return found


def capacity(folder: Path) -> int:
    """Bytes of the disk below a folder, at least 1."""
    disk = os.statvfs(folder)
    return max(1, disk.f_blocks * disk.f_frsize)


def disk_of(folder: Path) -> int | None:
    """The device that holds a directory, or will."""
    for place in (folder, *folder.parents):
        try:
            return place.stat().st_dev
        except OSError:
            continue
    return None


def _is_full(root: Path) -> bool:
    try:
        disk = os.statvfs(root)
    except OSError:
        return True
    return disk.f_bavail * disk.f_frsize < _SPACE
