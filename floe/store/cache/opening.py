"""A node cache out of its directories, one or more, and its writer."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from floe.store.cache.bypass import Bypass
from floe.store.cache.group import CacheGroup, capacity, disk_of
from floe.store.cache.group_writer import GroupWriter
from floe.store.cache.node_cache import NodeCache, disk_errors
from floe.store.cache.writer import CacheWriter
from floe.store.errors import BadInputError, DiskError, FloeError, NoSpaceError, UnavailableError
from floe.store.policy import NEVER

_log = logging.getLogger(__name__)

Cache: TypeAlias = NodeCache | CacheGroup
Writer: TypeAlias = CacheWriter | GroupWriter
# Where install/bootstrap mounts disks for the cache.
_MOUNTS = re.compile(r"(/mnt/floe-cache-\d+)/.*")

Bounds: TypeAlias = Callable[[int], tuple[int | None, int]]


def open_cache(roots: Sequence[Path], bounds: Bounds = lambda _total: (None, 0), *, required: bool = True) -> Cache:
    """The cache in `roots`, made where they are not there. A directory that cannot be is left out if others can.

    With `required` off also the last one: reads need none.
    `bounds` says for a disk's bytes what `size` and `min_free` of a NodeCache are; of a disk that holds several of the
    directories each has its part. BadInputError when a directory is named twice; the disk's errors.
    """
    members: list[NodeCache] = []
    missing: dict[Path, FloeError] = {}
    disks = Counter(disk for root in roots if (disk := disk_of(root)) is not None)
    for root in roots:
        try:
            member = _open(root, bounds, disks)
        except FloeError as error:
            missing[root] = error
            continue
        if any(root.samefile(other.root) for other in members):
            raise BadInputError(f"{root} is named twice among the cache's directories", hint="name it once")
        members.append(member)
    if not members and required:
        raise next(iter(missing.values()))
    for root, problem in missing.items():
        _log.error("cache directory %s is left out: %s", root, problem)
    if len(roots) == 1 and members:
        return members[0]
    problems = {root: str(problem) for root, problem in missing.items()}
    return CacheGroup(members or [NodeCache(root, make=False) for root in roots], problems)


def _open(root: Path, bounds: Bounds, disks: Mapping[int, int]) -> NodeCache:
    mount = _MOUNTS.fullmatch(str(root))
    if mount is not None and not os.path.ismount(mount[1]):
        # What lies below is another disk, the system's for example, and the cache would fill that one.
        raise UnavailableError(
            f"cache folder {root}: no disk is mounted at {mount[1]}",
            hint="systemctl restart floe-node mounts it; journalctl -u floe-node says what is amiss",
        )
    with disk_errors(f"cache folder {root}"):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        total, sharers = capacity(root), disks.get(root.stat().st_dev, 1)
    return NodeCache(root, size=bounds(total // sharers)[0], min_free=bounds(total)[1])


def open_writer(cache: Cache, *, wait: float = 0.0, bypass: str = NEVER) -> Writer:
    """The writer of a cache; see CacheWriter. `bypass`: one of bypass.MODES.

    BusyError. A directory that cannot be written to is left out, also the only one: reads go to the store, and need a writer.
    """
    if isinstance(cache, CacheGroup):
        return GroupWriter(cache, wait=wait, bypass=bypass)
    try:
        return CacheWriter(cache, wait=wait, bypass=Bypass(bypass, str(cache.root)))
    except (DiskError, NoSpaceError, OSError):
        return GroupWriter(CacheGroup([cache]), wait=wait, bypass=bypass)  # which says what is wrong, if it still is
