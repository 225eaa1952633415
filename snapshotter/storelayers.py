"""Lazy layers out of Floe's store: the catalog names trees, the node cache holds them, the tree mounter mounts them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from floe.mount.mounter import MountState, TreeMounter
from floe.mount.quiet import packfs_device
from floe.mount.state import PACKFS
from floe.protos import packfs_control
from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.lazylayers import Usage
from floe.store import mounttable
from floe.store.cache import open_cache
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DeadlineError, FloeError, NotFoundError, UnavailableError
from floe.store.ids import check_oci_digest
from floe.store.index import NullIndex, open_index
from floe.store.index.measured import MeasuredIndex
from floe.store.keyfiles import load_trust
from floe.store.objects import open_store
from floe.store.objects.retry import RetryingStore
from floe.store.process import is_alive
from floe.store.spans import TRACEPARENT
from floe.store.trees import LocalTree, TreeStore
from floe.store.vouching import Vouching

log = logging.getLogger(__name__)

# Units of st_blocks (stat(2)).
_BLOCK = 512
# How long the pack filesystem is taken to be as it was found, in seconds.
PACKFS_LIFETIME = 1.0
# How long a worker of the pack filesystem may take to succeed another, in seconds; it is some 0.3.
_SUCCESSION = 2.0


def open_layers(config: SnapshotterConfig) -> StoreLayers:
    """Lazy layers out of the configured store, index, cache and run directory; nothing is asked over the network."""
    # A look-up that could still succeed after its deadline would only hold a thread.
    store = RetryingStore(open_store(config.store_url, retry=False), deadline=config.prepare_timeout)
    index = open_index(config.index_url)
    if not isinstance(index, NullIndex):
        index = MeasuredIndex(index)
    catalog = Catalog(store, index, Vouching(load_trust(config.trusted_keys)))
    cache = open_cache((config.cache_dir, *config.cache_dirs))
    mounter = TreeMounter(config.run_dir, cache, loop=config.loop, kind=config.mounter)
    return StoreLayers(catalog, TreeStore(store, cache), mounter)


class StoreLayers:
    """See LazyLayers for what each method promises."""

    def __init__(self, catalog: Catalog, trees: TreeStore, mounter: TreeMounter) -> None:
        self._catalog = catalog
        self._trees = trees
        self._mounter = mounter
        self._lock = threading.Lock()
        self._packfs: tuple[float, str | None] = (-PACKFS_LIFETIME, None)
        self._vouched: set[str] = set()  # a digest is what it is, and trust stays as it is while this process lives

    @property
    def trusted(self) -> tuple[str, ...]:
        """The keys that the catalog goes by."""
        trust = self._catalog.vouching.trust
        return () if trust is None else trust.ids

    def resolve(self, chain_id: str) -> str | None:
        """The tree of a chain id; None also without a store, and for digests other than sha256."""
        try:
            check_oci_digest(chain_id)
            self._catalog.check_store()
        except (BadInputError, NotFoundError):
            return None
        found = self._catalog.resolve_chain(chain_id)
        return None if found is None else found[2].tree.digest

    def vouch(self, tree: str) -> None:
        """Look for a signature of the tree in the store, once."""
        if not self.vouched(tree):
            self._catalog.check_tree(tree)
            with self._lock:
                self._vouched.add(tree)

    def vouched(self, tree: str) -> bool:
        """Whether that is done, or need not be."""
        with self._lock:
            return self._catalog.vouching.trust is None or tree in self._vouched

    def fetch(self, tree: str, deadline: float) -> None:
        """Fetch the tree and its pack indexes."""
        self._trees.fetch(tree, deadline)

    def fetch_local(self, tree: str) -> bool:
        """Whether mounting needs no network."""
        return self._trees.fetch_local(tree) is not None

    def expect(self, tree: str, nbytes: int) -> None:
        """Tell the pack filesystem, if one runs; what is complete needs it not."""
        local = self._trees.fetch_local(tree)
        if local is not None and not all(pack.complete for pack in local.packs):
            packfs_control.expect(self._mounter.run_dir, tree, nbytes)

    def unexpect(self, tree: str) -> None:
        """Tell it that, too."""
        packfs_control.unexpect(self._mounter.run_dir, tree)

    def started(self, key: str, name: str, trees: Sequence[str]) -> None:
        """Tell the pack filesystem."""
        packfs_control.started(self._mounter.run_dir, key, name, trees, TRACEPARENT.get())

    def index_status(self) -> Mapping[str, Any]:
        """As measured since the start."""
        index = self._catalog.index
        return index.status() if isinstance(index, MeasuredIndex) else {}

    def mount(self, tree: str, owner: str) -> None:
        """Mount the tree."""
        self._mounter.mount(self._local(tree), owner)

    def bind(self, tree: str, target: Path) -> None:
        """Bind the mounted tree."""
        self._mounter.bind(tree, target)

    def unbind(self, target: Path) -> None:
        """Take the bind away, if there is one."""
        # The parent's real path only: a stat on a dead mount may never return.
        if mounttable.mounts_at(target.parent.resolve() / target.name):
            self._mounter.unbind(target)

    def release(self, tree: str, owner: str) -> None:
        """End a use of the tree."""
        self._mounter.release(tree, owner)

    def healthy(self, tree: str) -> bool:
        """Whether the tree's mount answers; DeadlineError when it is silent.

        The answer must be cheap, since a Prepare asks it of every layer: only when the mounter's record and a living
        pack filesystem leave a doubt is the mount itself asked, by a process of its own. A pack filesystem without a
        worker is not asked: whoever did would wait as long as its readers.
        """
        record = self._mounter.state.record(tree)
        if record is not None and record.server and not is_alive(record.server):
            return False
        if record is not None and (record.mode != PACKFS or record.packfs_device == self._living_packfs()):
            return True
        if record is not None and record.packfs_device == packfs_device(self._mounter.run_dir) and self._is_silent():
            raise DeadlineError(
                f"tree {tree}: no worker of its pack filesystem answers, reads of it wait", hint="start `floe packfs`"
            )
        return self._mounter.check(tree) is MountState.HEALTHY

    def usage(self, tree: str, without: AbstractSet[str] = frozenset()) -> Usage:
        """The image and what the cache holds of its packs, in bytes on disk and files."""
        local = self._trees.fetch_local(tree)
        if local is None:
            return Usage(0, 0)
        size = inodes = 0
        for path in (local.image, *(pack.data for pack in local.packs if pack.id not in without)):
            size += path.stat().st_blocks * _BLOCK
            inodes += 1
        return Usage(size, inodes)

    def packs(self, tree: str) -> frozenset[str] | None:
        """The ids of the tree's packs."""
        local = self._trees.fetch_local(tree)
        return None if local is None else frozenset(pack.id for pack in local.packs)

    def uses(self) -> list[tuple[str, str]]:
        """What the mounter has recorded since this boot."""
        state = self._mounter.state
        trees = [folder.name for folder in state.owner_folders()]
        return [(tree, owner) for tree in trees for owner in state.owners(tree)]

    def sweep(self) -> None:
        """The mounter's sweep; what it did is logged."""
        for line in self._mounter.sweep():
            log.info("%s", line)

    def _living_packfs(self) -> str | None:
        """The device of the pack filesystem while its worker answers; None otherwise. Asked at most once a second."""
        with self._lock:
            asked, device = self._packfs
            if time.monotonic() - asked < PACKFS_LIFETIME:
                return device
            try:
                self._mounter.packfs.ping()
                device = packfs_device(self._mounter.run_dir) or None
            except FloeError:
                device = None
            self._packfs = (time.monotonic(), device)
            return device

    def _is_silent(self) -> bool:
        """Whether no worker answers, for longer than one takes to succeed another."""
        until = time.monotonic() + _SUCCESSION
        while time.monotonic() < until:
            try:
                self._mounter.packfs.ping()
            except FloeError:
                time.sleep(_SUCCESSION / 20)
            else:
                return False
        return True

    def _local(self, tree: str) -> LocalTree:
        local = self._trees.fetch_local(tree)
        if local is None:
            raise UnavailableError(f"tree {tree} is no longer in the node cache", hint="try again: it is fetched anew")
        return local
