"""Checking a store: everything that is named is there, and is what its name says; what is not is told with whom it concerns."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.chunkfinder import each
from floe.store.erofs import read_device_table
from floe.store.erofs_reader import read_image
from floe.store.errors import DamagedError, FloeError, NotFoundError
from floe.store.packindex import PackIndex, decode_chunk_table
from floe.store.progress import Progress
from floe.store.records import Manifest, PackEntry
from floe.store.treeobject import decode_tree
from floe.upkeep.garbage import unit_of
from floe.upkeep.names import NameReader, Names
from floe.upkeep.users import Users
from floe.upkeep.verify import Pace, bad_frames

RECORD, LAYER, MANIFEST, TREE, PACK, PACK_INDEX, CHUNK_TABLE = (
    *("record", "layer", "manifest", "tree"),
    *("pack", "pack index", "chunk table"),
)
MISSING, DAMAGED = "missing", "damaged"


@dataclass
class Fault:
    """The object at `key` is `missing` or `damaged`: `detail` says how, `frames` which of a pack.

    `models`, `images` and `layers` (diff ids) are those that cannot be used as a whole because of it. `repair`: what was done
    about it; `repaired`: it is sound again.
    """

    kind: str
    key: str
    problem: str
    detail: str
    frames: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    repair: str = ""
    repaired: bool = False

    @property
    def name(self) -> str:
        """The digest that names the object, or what stands at the end of its key."""
        return self.key.rpartition("/")[2]


@dataclass
class Checked:
    """What was looked at, in numbers, and what is wrong. `orphans`: objects that nobody names, which is no fault."""

    models: int = 0
    images: int = 0
    layers: int = 0
    manifests: int = 0
    trees: int = 0
    packs: int = 0
    frames: int = 0
    read_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


class Checker:
    """Checks the store of `catalog`. `deep`: also every frame of every pack, by `workers` threads of some 20 MiB each.

    `rate`: the most bytes a second read of packs. Memory: some 300 bytes for each name, manifest, tree and pack.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        deep: bool = False,
        workers: int = 4,
        rate: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._catalog, self._store = catalog, catalog.store
        self._deep, self._workers, self._pace, self._progress = deep, workers, Pace(rate), progress
        self._done = Checked()
        self._manifests: dict[str, Manifest] = {}
        self._sizes: dict[str, int] = {}  # of what is listed, by key

    def run(self) -> Checked:
        """Look at everything. Raises the store's passing errors, and AccessDeniedError."""
        self._catalog.check_store()
        names = NameReader(self._store).read()
        self._list()
        users = Users(names)
        self._check_names(names)
        self._check_manifests(users)
        self._check_trees(users)
        self._check_packs(users)
        self._count(names, users)
        for fault in self._done.faults:
            found = users.of(fault.key, self._manifests)
            fault.models, fault.images, fault.layers = found.models, found.images, found.layers
        return self._done

    def _list(self) -> None:
        for prefix in (layout.MANIFESTS, layout.TREES, layout.PACK_INDEXES, layout.CHUNK_TABLES, layout.PACKS):
            self._sizes.update((info.key, info.size) for info in self._store.list(prefix) if unit_of(info.key))
        if self._progress is not None:
            packs = f"{layout.PACKS}/"
            self._progress.total(sum(s for k, s in self._sizes.items() if self._deep or not k.startswith(packs)))

    def _read(self, nbytes: int) -> None:
        self._done.read_bytes += nbytes
        if self._progress is not None:
            self._progress.advance(nbytes)

    def _fault(self, kind: str, key: str, error: FloeError) -> None:
        self._done.faults.append(_of(kind, key, error))

    # What names say

    def _check_names(self, names: Names) -> None:
        for problem in names.problems:
            self._fault(RECORD, problem.key, problem.error)
        unread = {problem.key for problem in names.problems}
        for image in names.images.values():
            for diff_id, chain_id in zip(image.diff_ids, image.chain_ids, strict=True):
                key, chain = layout.layer_ref_key(diff_id), layout.chain_ref_key(chain_id)
                record = names.chains.get(chain)
                if record is not None and record.diff_id != diff_id:
                    self._fault(RECORD, chain, DamagedError(f"{chain} says {record.diff_id}, an image {diff_id}"))
                # Of a layer that Floe leaves to containerd there is neither a chain record nor a ref.
                elif record is not None and key not in names.layers and key not in unread:
                    self._fault(LAYER, key, NotFoundError(f"layer {diff_id} of an image has no ref"))

    def _check_manifests(self, users: Users) -> None:
        def read(digest: str) -> tuple[str, Manifest | FloeError]:
            try:
                return digest, self._catalog.get_manifest(digest)
            except FloeError as error:
                return digest, _kept(error)

        for digest, found in each(read, sorted(users.manifests)):
            if isinstance(found, FloeError):
                self._fault(MANIFEST, layout.manifest_key(digest), found)
            else:
                self._manifests[digest] = found
            self._read(self._sizes.get(layout.manifest_key(digest), 0))

    def _check_trees(self, users: Users) -> None:
        wanted: dict[str, Manifest | None] = dict.fromkeys(users.trees)
        wanted.update((manifest.tree.digest, manifest) for manifest in self._manifests.values())

        def read(digest: str) -> tuple[str, list[str] | FloeError]:
            try:
                image = decode_tree(self._store.get(layout.tree_key(digest)), digest)
                packs = [pack_id for pack_id, _ in read_device_table(image, f"tree {digest}")]
                manifest = wanted[digest]
                if manifest is not None and [pack.id for pack in manifest.packs] != packs:
                    return digest, DamagedError(f"tree {digest} has other packs than its manifest says")
                if self._deep:
                    read_image(image, f"tree {digest}")
            except FloeError as error:
                return digest, _kept(error)
            return digest, packs

        for digest, found in each(read, sorted(wanted)):
            key = layout.tree_key(digest)
            if isinstance(found, FloeError):
                self._fault(TREE, key, found)
            else:
                users.packs_of[digest] = tuple(found)
            self._read(self._sizes.get(key, 0))
        self._done.trees = len(wanted)

    # Packs

    def _check_packs(self, users: Users) -> None:
        expected: dict[str, PackEntry | None] = {
            key.rpartition("/")[2]: None for key in self._sizes if key.startswith(f"{layout.PACKS}/")
        }
        expected.update(dict.fromkeys(pack_id for packs in users.packs_of.values() for pack_id in packs))
        expected.update((pack.id, pack) for manifest in self._manifests.values() for pack in manifest.packs)
        self._done.packs = len(expected)
        named = self._named_packs(users)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="floe-fsck") as pool:
            checks = pool.map(lambda item: self._pack(*item, named=item[0] in named), sorted(expected.items()))
            try:
                for faults, frames, read in checks:
                    self._done.faults += faults
                    self._done.frames += frames
                    self._done.read_bytes += read
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _pack(self, pack_id: str, entry: PackEntry | None, *, named: bool) -> tuple[list[Fault], int, int]:
        """What is wrong with a pack, how many frames of it were read, and how many bytes in all."""
        key, index_key, table_key = (
            make(pack_id) for make in (layout.pack_key, layout.pack_index_key, layout.chunk_table_key)
        )
        size = self._sizes.get(key)
        if index_key not in self._sizes and not named:
            return [], 0, 0  # a push that was killed left it, or one is at it
        faults, read = [], 0
        try:
            data = self._store.get(index_key)
            index = PackIndex.decode(data, pack_id)
            if entry is not None and (index.content_size, index.frame_size) != (entry.content_size, entry.frame_size):
                raise DamagedError(f"pack index {pack_id} has other sizes than a manifest says")
        except FloeError as error:
            if isinstance(error, NotFoundError) and not named:
                return [], 0, 0  # collected since it was listed
            return [_of(PACK_INDEX, index_key, _kept(error))], 0, 0
        read += self._advance(len(data))
        try:
            table = self._store.get(table_key)
            decode_chunk_table(table, index, pack_id)
            read += self._advance(len(table))
        except FloeError as error:
            if isinstance(error, NotFoundError) and not named and self._is_collected(index_key):
                return [], 0, read
            faults.append(_of(CHUNK_TABLE, table_key, _kept(error)))
        if size is None:
            return [*faults, _of(PACK, key, NotFoundError(f"no object {key} in {self._store.url}"))], 0, read
        if size != index.stored_size:
            wrong = DamagedError(f"pack {pack_id} has {size} bytes, its index says {index.stored_size}")
            return [*faults, _of(PACK, key, wrong)], 0, read
        if not self._deep:
            return faults, 0, read
        try:
            bad = bad_frames(self._store, pack_id, index, self._pace, self._advance)
        except NotFoundError as error:
            if not named and self._is_collected(index_key):
                return [], 0, read
            return [*faults, _of(PACK, key, error)], 0, read
        if bad:
            text = f"{len(bad)} of {len(index.frames)} frames of pack {pack_id} do not match their digests"
            faults.append(_of(PACK, key, DamagedError(text), bad))
        return faults, len(index.frames), read + size

    def _is_collected(self, index_key: str) -> bool:
        """Whether a pack that nobody names has lost its index too since it was listed: that goes first."""
        try:
            self._store.head(index_key)
        except NotFoundError:
            return True
        return False

    def _named_packs(self, users: Users) -> set[str]:
        of_trees = {pack_id for packs in users.packs_of.values() for pack_id in packs}
        return of_trees | {pack.id for manifest in self._manifests.values() for pack in manifest.packs}

    def _advance(self, nbytes: int) -> int:
        if self._progress is not None:
            self._progress.advance(nbytes)
        return nbytes

    def _count(self, names: Names, users: Users) -> None:
        done = self._done
        done.models, done.images, done.layers = len(names.models), len(names.images), len(names.layers)
        done.manifests = len(users.manifests)
        needed = {layout.manifest_key(digest) for digest in users.manifests}
        needed |= {layout.tree_key(digest) for digest in (*users.trees, *users.packs_of)}
        needed |= {layout.tree_key(manifest.tree.digest) for manifest in self._manifests.values()}
        needed |= {layout.pack_key(pack_id) for pack_id in self._named_packs(users)}
        for key, size in self._sizes.items():
            if unit_of(key) not in needed:
                done.orphans += 1
                done.orphan_bytes += size


def _of(kind: str, key: str, error: FloeError, frames: Iterable[int] = ()) -> Fault:
    problem = MISSING if isinstance(error, NotFoundError) else DAMAGED
    return Fault(kind, key, problem, str(error), tuple(frames))


def _kept(error: FloeError) -> FloeError:
    """`error` as a finding; one that may pass is none."""
    if error.retryable:
        raise error
    return error
