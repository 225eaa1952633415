"""One model looked at as `floe fsck --deep` looks at a store: its manifest, its tree, and every frame that the tree needs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs_inodes import Inodes
from floe.store.erofs_reader import read_image
from floe.store.errors import DamagedError, FloeError
from floe.store.packindex import PackIndex
from floe.store.progress import Progress
from floe.store.records import Manifest
from floe.store.treecontent import content_of
from floe.store.treeobject import decode_tree
from floe.upkeep.verify import Pace, bad_frames


@dataclass(frozen=True)
class PackFault:
    """A pack that the model cannot be read from whole: its `frames` that do not match, by number, or why it cannot be read at all."""

    pack: str
    detail: str
    frames: tuple[int, ...] = ()


@dataclass
class ModelChecked:
    """What was read, in numbers and bytes, and what is wrong; `tree_fault`: nothing of the model can be read."""

    frames: int = 0
    read_bytes: int = 0
    tree_fault: str = ""
    faults: list[PackFault] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether anything is."""
        return bool(self.tree_fault or self.faults)


def check_model(
    catalog: Catalog, manifest: Manifest, *, workers: int = 4, rate: int | None = None, progress: Progress | None = None
) -> ModelChecked:
    """Read and verify everything that the model needs, from the store; no cache is asked. `rate`: at most so many bytes a second.

    Raises the store's passing errors, and AccessDeniedError.
    """
    done = ModelChecked()
    tree = manifest.tree.digest
    try:
        data = catalog.store.get(layout.tree_key(tree))
        image = decode_tree(data, tree)
        inodes = Inodes(image, f"tree {tree}")
        if [pack.id for pack in manifest.packs] != [pack_id for pack_id, _ in inodes.packs]:
            raise DamagedError(f"tree {tree} has other packs than its manifest says")
        read_image(image, f"tree {tree}")
        wanted = content_of(inodes, {pack.id: pack.frame_size for pack in manifest.packs}).masks
    except FloeError as error:
        if error.retryable:
            raise
        done.tree_fault = str(error)
        return done
    done.read_bytes += len(data)
    if progress is not None:
        progress.total(sum(pack.stored_size for pack in manifest.packs))
    pace = Pace(rate)

    def check(item: tuple[str, int]) -> tuple[PackFault | None, int, int]:
        return _check_pack(catalog, *item, pace=pace, progress=progress)

    with ThreadPoolExecutor(workers, thread_name_prefix="floe-verify") as pool:
        try:
            for fault, frames, read in pool.map(check, sorted(wanted.items())):
                done.frames += frames
                done.read_bytes += read
                if fault is not None:
                    done.faults.append(fault)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return done


def _check_pack(
    catalog: Catalog, pack_id: str, wanted: int, *, pace: Pace, progress: Progress | None
) -> tuple[PackFault | None, int, int]:
    """What is wrong with the frames `wanted` (bit N: frame N) of a pack, how many they are, and the bytes read."""
    read = 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress.advance(nbytes)

    try:
        index = PackIndex.decode(catalog.store.get(layout.pack_index_key(pack_id)), pack_id)
        if wanted >> len(index.frames):
            raise DamagedError(f"the tree reaches past the end of pack {pack_id}")
        bad = bad_frames(catalog.store, pack_id, index, pace, count, wanted=wanted)
    except FloeError as error:
        if error.retryable:
            raise
        return PackFault(pack_id, str(error)), 0, read
    frames = wanted.bit_count()
    if not bad:
        return None, frames, read
    text = f"{len(bad)} of {frames} frames do not match their digests"
    return PackFault(pack_id, text, tuple(bad)), frames, read
