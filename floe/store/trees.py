"""Fetching what a mount needs before it exists: the tree's image and the indexes of all its packs.

After that, no look-up or open touches the network. Everything is verified, kept in the node cache and fetched once,
however many threads ask at the same time; two processes may fetch the same thing, harmlessly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from floe.store import layout
from floe.store.cache import Cache
from floe.store.erofs import read_device_table
from floe.store.errors import DamagedError, DeadlineError, FloeError, NotFoundError
from floe.store.ids import Buffer, check_hexdigest
from floe.store.objects.base import ObjectStore
from floe.store.packindex import BLOCK
from floe.store.treeobject import decode_tree

T = TypeVar("T")
_PARALLEL = 16  # requests for indexes at a time
_TRIES = 3  # of an object that does not match its digest: damage in transit goes away
_AGAIN = "push its model or index its image again"


@dataclass(frozen=True)
class LocalPack:
    """A pack on this node: sizes in bytes, `data` its sparse file, `complete` when that file may be mounted as it is."""

    id: str
    content_size: int
    data: Path
    complete: bool


@dataclass(frozen=True)
class LocalTree:
    """A tree on this node, ready to be mounted. `packs` is in the order of the image's device table."""

    digest: str
    image: Path
    packs: tuple[LocalPack, ...]


class _Fetch:
    """One fetch under way: `finished` is set after `tree` or `error`."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.tree: LocalTree | None = None
        self.error: FloeError | None = None


class TreeStore:
    """Trees of `store`, kept in `cache`. Thread-safe."""

    def __init__(self, store: ObjectStore, cache: Cache) -> None:
        self._store = store
        self._cache = cache
        self._lock = threading.Lock()  # guards _fetches
        self._fetches: dict[str, _Fetch] = {}

    def fetch_local(self, digest: str) -> LocalTree | None:
        """The tree if everything that mounting needs is on this node; no network."""
        image = self._cache.tree_path(check_hexdigest(digest, "tree digest"))
        if image is None:
            return None
        table = self._devices(digest, image)
        if any(self._cache.content_size(pack_id) is None for pack_id, _ in table):
            return None
        return self._local(digest, image, table)

    def fetch(self, digest: str, deadline: float) -> LocalTree:
        """The tree, fetched if need be within `deadline` seconds.

        Raises NotFoundError, DamagedError, UnsupportedError, UnavailableError, AccessDeniedError, NoSpaceError, and
        DeadlineError, after which the fetch goes on in the background for the next attempt to find.
        """
        check_hexdigest(digest, "tree digest")
        until = time.monotonic() + deadline
        local = self.fetch_local(digest)
        if local is not None:
            return local
        with self._lock:
            fetch = self._fetches.get(digest)
            if fetch is None:
                fetch = self._fetches[digest] = _Fetch()
                # A daemon: a silent store must not keep a process from ending.
                threading.Thread(target=self._run, args=(digest, fetch), name="floe-tree", daemon=True).start()
        if not fetch.finished.wait(max(0.0, until - time.monotonic())):
            raise DeadlineError(
                f"tree {digest} did not arrive from {self._store.url} within {deadline:g} s",
                hint="check that the store is reachable, then try again",
            )
        if fetch.error is not None:
            raise fetch.error
        assert fetch.tree is not None
        return fetch.tree

    def _run(self, digest: str, fetch: _Fetch) -> None:
        try:
            fetch.tree = self._fetch(digest)
        except FloeError as error:
            fetch.error = error
        except Exception as error:
            fetch.error = FloeError(f"tree {digest} could not be fetched: {error!r}")
            raise
        finally:
            with self._lock:
                del self._fetches[digest]
            fetch.finished.set()

    def _fetch(self, digest: str) -> LocalTree:
        image = self._cache.tree_path(digest)
        if image is None:
            key = layout.tree_key(digest)
            decoded = self._get(key, f"tree {digest}", lambda data: decode_tree(data, digest))
            image = self._cache.add_tree(digest, decoded)
        table = self._devices(digest, image)
        in_parallel(self._fetch_index, [pack_id for pack_id, _ in table if self._cache.content_size(pack_id) is None])
        return self._local(digest, image, table)

    def _fetch_index(self, pack_id: str) -> None:
        key = layout.pack_index_key(pack_id)
        self._get(key, f"index of pack {pack_id}", lambda data: self._cache.add_index(pack_id, data))

    def _get(self, key: str, what: str, check: Callable[[Buffer], T]) -> T:
        for attempt in range(1, _TRIES + 1):
            try:
                return check(self._store.get(key))
            except NotFoundError as error:
                raise NotFoundError(f"{what} is not in {self._store.url}", hint=_AGAIN) from error
            except DamagedError as error:
                if attempt == _TRIES:
                    raise DamagedError(f"{error} (in {self._store.url}, read {_TRIES} times)", hint=_AGAIN) from error
        raise AssertionError

    def _devices(self, digest: str, image: Path) -> list[tuple[str, int]]:
        try:
            return read_device_table(image)
        except DamagedError as error:
            raise DamagedError(f"tree {digest}: {error}", hint=_AGAIN) from error

    def _local(self, digest: str, image: Path, table: Iterable[tuple[str, int]]) -> LocalTree:
        packs = []
        for pack_id, blocks in table:
            data = self._cache.data_path(pack_id)
            size = self._cache.content_size(pack_id)
            assert size is not None
            if blocks * BLOCK > size:
                raise DamagedError(f"tree {digest} reaches past the end of pack {pack_id}", hint=_AGAIN)
            packs.append(LocalPack(pack_id, size, data, self._cache.is_complete(pack_id)))
        return LocalTree(digest, image, tuple(packs))


def in_parallel(call: Callable[[str], None], items: list[str]) -> None:
    """Run `call` on every item in a few daemon threads; raises the first error, after the others under way ended."""
    queue: SimpleQueue[str] = SimpleQueue()
    for item in items:
        queue.put(item)
    errors: list[Exception] = []

    def work() -> None:
        while not errors:
            try:
                call(queue.get_nowait())
            except Empty:
                return
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, name="floe-index", daemon=True) for _ in items[:_PARALLEL]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
