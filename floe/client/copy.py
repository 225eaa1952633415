"""A model from one store into another, or under one more name in the same: what is copied is verified, and named last."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from floe.ingest.examine import read_pack
from floe.ingest.packinfo import PackInfo
from floe.ingest.packwriter import spool_failure
from floe.ingest.spool import Spool
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError
from floe.store.ids import Buffer, ModelRef
from floe.store.packindex import PackIndex, decode_chunk_table
from floe.store.profiles import ProfileStore, model_source
from floe.store.progress import Progress
from floe.store.protection import Protection
from floe.store.records import Manifest, PackEntry
from floe.store.treeobject import decode_tree


@dataclass(frozen=True)
class Copied:
    """What `ref` names now: `digest`, and what it named before (None: nothing); packs and bytes that were not there yet."""

    ref: ModelRef
    digest: str
    previous: str | None
    manifest: Manifest
    new_packs: int
    new_bytes: int


def copy_model(
    source: Catalog,
    target: Catalog,
    ref: ModelRef,
    name: ModelRef,
    *,
    spool: Path,
    progress: Progress | None = None,
) -> Copied:
    """Let `name` (NAME:TAG) in `target` name what `ref` names in `source`; the digest is the same in both.

    Packs that `target` has are not sent again. Of the others every frame is verified on its way, a pack at a time in a directory
    of its own below `spool`. The target's signer signs; signatures of others are not taken along. BadInputError: `name` has no tag.
    DamagedError: the source is. ConflictError: the name was moved meanwhile. Until it has all, `target` names what it named
    before.
    """
    if name.tag is None:
        raise BadInputError(f"{name} has no tag", hint="give NAME:TAG for the copy")
    digest, manifest = source.resolve_model(ref)
    target.ensure_store()
    moved_from = target.find_model(name)
    if progress is not None:
        progress.total(sum(pack.stored_size for pack in manifest.packs))
    with closing(Protection(target.store)) as protection, Spool(spool) as held:
        tree = manifest.tree.digest
        packs = PackInfo(target.store, protection)
        packs.protect(pack.id for pack in manifest.packs)
        new = []
        for pack in manifest.packs:
            if packs.find(pack.id) is None:
                _copy_pack(source, target, pack, held.path, protection)
                packs.add(pack)
                new.append(pack)
            if progress is not None:
                progress.advance(pack.stored_size)
        protection.protect((layout.tree_key(tree), layout.manifest_key(digest), layout.model_ref_key(name)))
        data = source.store.get(layout.tree_key(tree))
        decode_tree(data, tree)
        target.store.put(layout.tree_key(tree), data)
        # Its bytes, not what this Floe would write: a later one may have put more into it, and the digest is theirs.
        target.store.put(layout.manifest_key(digest), source.manifest_bytes(digest))
        target.sign_tree(tree)
        protection.renew()
        previous = target.move_model(name, digest, moved_from)
        ProfileStore(target).seed(tree, model_source(name.name))
    return Copied(name, digest, previous, manifest, len(new), sum(pack.stored_size for pack in new))


def _copy_pack(source: Catalog, target: Catalog, pack: PackEntry, spool: Path, protection: Protection) -> None:
    index_data = source.store.get(layout.pack_index_key(pack.id))
    index = PackIndex.decode(index_data, pack.id)
    table = source.store.get(layout.chunk_table_key(pack.id))
    chunks = decode_chunk_table(table, index, pack.id)
    path = spool / pack.id
    try:
        try:
            with path.open("xb") as file:

                def keep(at: int, data: Buffer) -> None:
                    file.seek(at)
                    file.write(data)

                whole, bad = read_pack(source.store, pack.id, index, keep)
        except OSError as error:
            raise spool_failure(error, spool) from error
        if bad or not whole:
            raise DamagedError(
                f"pack {pack.id} in {source.store.url} is damaged in {len(bad)} frames",
                hint="push the model there again, or `floe fsck --repair`, then copy it",
            )
        target.store.put_file(layout.pack_key(pack.id), path, lambda _: protection.renew())
    finally:
        path.unlink(missing_ok=True)
    target.store.put(layout.chunk_table_key(pack.id), table)
    target.store.put(layout.pack_index_key(pack.id), index_data)  # only now may others build upon it
    target.add_pack(pack.id, chunks)
