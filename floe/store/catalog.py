"""The store's names and manifests: what a digest, a model's name, a layer, a chain or an image stands for.

The bucket is the truth. The index only saves requests: it keeps copies of layer and chain refs and knows which
chunks are stored where. When it fails, that is logged and the catalog goes on with the bucket. Refs are changed
by conditional put: whoever loses reads again and decides again, so concurrent changes are never lost unseen.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import TypeVar

from floe.store import imagenames, layout
from floe.store.chunkfinder import ChunkFinder
from floe.store.errors import (
    BadInputError,
    ConflictError,
    DamagedError,
    FloeError,
    NotFoundError,
    UnavailableError,
    UntrustedError,
)
from floe.store.ids import Buffer, ModelRef, chain_ids, check_hexdigest, hexdigest
from floe.store.index.base import ChunkPlace, Index
from floe.store.objects.base import ObjectStore
from floe.store.packindex import ChunkEntry
from floe.store.records import (
    KIND_LAYER,
    KIND_MODEL,
    MOVES_KEPT,
    PARENT_LABEL,
    AttachmentRecord,
    ChainRecord,
    ImageRecord,
    Manifest,
    Record,
    Ref,
    StoreRecord,
)
from floe.store.refs import Damaged, list_records, remove_ref, remove_unchanged, replace_record, replace_unchanged
from floe.store.signing import Statement
from floe.store.vouching import Vouching

_log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", bound=Record)

_INDEX_REST = 30.0  # seconds without the index after it failed
_PUSH_AGAIN = "push its model or index its image again"


class Catalog:
    """What `store` holds, by name, with `index` to look it up faster. Thread-safe.

    Every method raises the store's errors; a failing index is only logged. Where `vouching` has trust, what `resolve_model`,
    `layer` and `resolve_chain` find is signed, or it is an UntrustedError; where it has a signer, refs that are set are signed.
    `by`: who is said to have moved a tag; "": nobody.
    """

    def __init__(self, store: ObjectStore, index: Index, vouching: Vouching | None = None, *, by: str = "") -> None:
        self.store = store
        self._by = by
        self.index = index
        self.vouching = vouching or Vouching()
        self._record: StoreRecord | None = None
        self._index_resting_until = 0.0  # time.monotonic()
        self._chunks = ChunkFinder(store, index)
        self._lock = threading.Lock()  # guards _record; never held during I/O

    # The store itself

    def ensure_store(self) -> StoreRecord:
        """The store's record; made first where there is none. UnsupportedError for an unknown format version."""
        try:
            return self.check_store()
        except NotFoundError:
            record = StoreRecord(str(uuid.uuid4()), _now())
        try:
            self.store.put_if(layout.STORE_KEY, record.encode(), None)
        except ConflictError:  # somebody else made it meanwhile
            return self.check_store()
        return self._bind(record)

    def check_store(self) -> StoreRecord:
        """The store's record, read once. NotFoundError when no store is there, UnsupportedError for its version."""
        with self._lock:
            known = self._record
        if known is not None:
            return known
        try:
            data = self.store.get(layout.STORE_KEY)
        except NotFoundError as error:
            raise type(error)(
                f"there is no Floe store at {self.store.url}",
                hint=error.hint or "push a model or index an image to create it, or check the store's address",
            ) from error
        return self._bind(StoreRecord.decode(data, layout.STORE_KEY))

    def _bind(self, record: StoreRecord) -> StoreRecord:
        self._try_index(lambda index: index.bind(record.uuid), None)
        with self._lock:
            self._record = record
        return record

    def close(self) -> None:
        """Close the index and the store."""
        self.index.close()
        self.store.close()

    # Manifests

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest; returns its digest. Its packs and tree must be stored already."""
        data = manifest.encode()
        digest = hexdigest(data)
        self.store.put(layout.manifest_key(digest), data)
        return digest

    def get_manifest(self, digest: str) -> Manifest:
        """The manifest of that digest; DamagedError when its bytes do not match it."""
        return Manifest.decode(self.manifest_bytes(digest), layout.manifest_key(digest))

    def manifest_bytes(self, digest: str) -> Buffer:
        """The same as it is stored: with what this Floe does not know."""
        data = self.store.get(layout.manifest_key(digest))
        if hexdigest(data) != digest:
            raise DamagedError(f"manifest {digest} does not match its digest", hint=_PUSH_AGAIN)
        return data

    def has_manifest(self, digest: str) -> bool:
        """Whether a manifest is in the store; what it needs is not looked at."""
        try:
            self.store.head(layout.manifest_key(digest))
        except NotFoundError:
            return False
        return True

    # Models

    def resolve_model(self, ref: ModelRef) -> tuple[str, Manifest]:
        """The digest and manifest of a model, by tag or by digest. NotFoundError when there is no such model.

        UntrustedError unless the tag is signed; of a digest, the tree.
        """
        self.check_store()
        if ref.digest:
            digest = ref.digest
        else:
            found = self.model_ref(ref)
            digest = found.manifest
            self.vouching.check(Statement.model(ref, digest), found.signatures)
        try:
            manifest = self.get_manifest(digest)
        except NotFoundError as error:
            raise NotFoundError(f"model {ref}: its manifest {digest} is not in the store", hint=_PUSH_AGAIN) from error
        if manifest.kind != KIND_MODEL:
            raise NotFoundError(f"{ref} is a {manifest.kind}, not a model", hint="`floe model ls` lists the models")
        if ref.digest:
            self.check_tree(manifest.tree.digest)
        return digest, manifest

    def model_ref(self, ref: ModelRef) -> Ref:
        """What a tag names, whoever signed it. NotFoundError when there is no such tag."""
        key = layout.model_ref_key(ref)
        try:
            return Ref.decode(self.store.get(key), key)
        except NotFoundError as error:
            raise _no_model(ref, self.store.url) from error

    def find_model(self, ref: ModelRef) -> str | None:
        """The digest that a tag names; None when there is no such tag, or store, or its ref is damaged."""
        try:
            return self.model_ref(ref).manifest
        except (NotFoundError, DamagedError):
            return None

    def sign_tree(self, tree: str) -> None:
        """Vouch for a tree of a model, whatever names it; nothing happens without a signer."""
        self.vouching.sign_tree(self.store, tree)

    def check_tree(self, tree: str) -> None:
        """UntrustedError when signatures are asked for and nobody who counts vouches for the tree."""
        self.vouching.check_tree(self.store, tree)

    def set_model(self, ref: ModelRef, digest: str) -> str | None:
        """Let a tag name a manifest; returns the digest that it named before. BadInputError without a tag."""
        check_hexdigest(digest, "manifest digest")
        previous, _ = self._set_ref(layout.model_ref_key(ref), Statement.model(ref, digest))
        return None if previous is None else previous.manifest

    def move_model(self, ref: ModelRef, digest: str, moved_from: str | None) -> str | None:
        """The same for a push that found the tag at `moved_from` (see `find_model`) when it began.

        ConflictError when the tag names something else by now, neither that nor `digest`; then it stays as it is.
        """
        check_hexdigest(digest, "manifest digest")

        def check(known: Ref | None) -> None:
            if known is not None and known.manifest not in (moved_from, digest):
                raise ConflictError(
                    f"{ref} was moved to {known.manifest} by somebody else meanwhile, and stays there",
                    hint=f"what was pushed is stored, as {ref.name}@{digest}; push again to move {ref} to it",
                )

        previous, _ = self._set_ref(layout.model_ref_key(ref), Statement.model(ref, digest), check)
        return None if previous is None else previous.manifest

    def remove_model(self, ref: ModelRef) -> str:
        """Remove a tag, or with NAME@DIGEST all tags of NAME that name it; returns the digest.

        The content stays until garbage collection. NotFoundError when there is no such tag. A tag that a push moves
        before it is looked at for the last time keeps what it was moved to; see refs.remove_ref for the moment after.
        A damaged ref goes too: "" then, for nobody knows what it named.
        """
        self.check_store()
        if ref.digest is None:
            try:
                digest = self.model_ref(ref).manifest
            except DamagedError:
                digest = ""
            self.store.delete(layout.model_ref_key(ref))
            return digest
        tags = [tag for tag, found in self.models() if tag.name == ref.name and found.manifest == ref.digest]
        removed = [tag for tag in tags if remove_ref(self.store, layout.model_ref_key(tag), ref.digest)]
        if not removed:
            raise _no_model(ref, self.store.url)
        return ref.digest

    def models(self, damaged: Damaged | None = None) -> Iterator[tuple[ModelRef, Ref]]:
        """All tags of all models, in order of their names. One that cannot be read is left out: logged, or told `damaged`."""
        return iter(self._tags(layout.MODEL_REFS, damaged))

    def tags_of(self, name: str, damaged: Damaged | None = None) -> list[tuple[ModelRef, Ref]]:
        """The same of one model, `[ORG/]NAME`."""
        return self._tags(layout.model_refs_of(name), damaged)

    def _tags(self, prefix: str, damaged: Damaged | None) -> list[tuple[ModelRef, Ref]]:
        self.check_store()
        found = []
        for key, ref in list_records(self.store, prefix, Ref, damaged):
            try:
                found.append((layout.parse_model_ref_key(key), ref))
            except BadInputError as error:
                _log.warning("%s: not Floe's, left out", error)
        return sorted(found, key=lambda item: str(item[0]))

    # Layers and chains

    def layer(self, diff_id: str) -> tuple[str, Manifest] | None:
        """The manifest of a layer and its digest; None when the layer is not in the store. UntrustedError: not signed."""
        self.check_store()
        key = layout.layer_ref_key(diff_id)
        cached = self._try_index(lambda index: index.get_ref(key), None)
        if cached is not None:
            try:
                ref = self._layer_ref(diff_id, cached)
                manifest = self.get_manifest(ref.manifest)
                if manifest.kind == KIND_LAYER:
                    return ref.manifest, manifest
            except (NotFoundError, DamagedError, UntrustedError):
                pass
            # The layer was indexed anew, signed or removed, since.
            self._try_index(lambda index: index.delete_ref(key), None)
        data = self._get_or_none(key)
        if data is None:
            return None
        ref = self._layer_ref(diff_id, data)
        try:
            manifest = self.get_manifest(ref.manifest)
        except NotFoundError as error:
            raise DamagedError(
                f"layer {diff_id}: its manifest {ref.manifest} is not in the store", hint="index its image again"
            ) from error
        if manifest.kind != KIND_LAYER:
            raise DamagedError(f"layer {diff_id}: its manifest {ref.manifest} is a {manifest.kind}'s")
        self._try_index(lambda index: index.put_ref(key, data), None)
        return ref.manifest, manifest

    def layer_ref(self, diff_id: str) -> Ref | None:
        """What the bucket says a layer is, whoever signed it; None when the layer is not in it."""
        self.check_store()
        key = layout.layer_ref_key(diff_id)
        data = self._get_or_none(key)
        return None if data is None else Ref.decode(data, key)

    def _layer_ref(self, diff_id: str, data: bytes) -> Ref:
        ref = Ref.decode(data, layout.layer_ref_key(diff_id))
        self.vouching.check(Statement.layer(diff_id, ref.manifest), ref.signatures)
        return ref

    def set_layer(self, diff_id: str, digest: str) -> None:
        """Let a diff id name a layer's manifest."""
        check_hexdigest(digest, "manifest digest")
        key = layout.layer_ref_key(diff_id)
        _, ref = self._set_ref(key, Statement.layer(diff_id, digest))
        # Into the index now: the nodes of a fleet that start the image next then only read.
        self._try_index(lambda index: index.put_ref(key, ref.encode()), None)

    def chain(self, chain_id: str) -> ChainRecord | None:
        """What a chain id stands for; None when no indexed image has that chain.

        A chain id is the hash of what it stands for, so nobody need sign a record: DamagedError for another's.
        """
        self.check_store()
        key = layout.chain_ref_key(chain_id)
        cached = self._try_index(lambda index: index.get_ref(key), None)
        if cached is not None:
            try:
                return _chain_record(chain_id, cached, key)
            except FloeError:
                self._try_index(lambda index: index.delete_ref(key), None)
        data = self._get_or_none(key)
        if data is None:
            return None
        record = _chain_record(chain_id, data, key)
        self._try_index(lambda index: index.put_ref(key, data), None)
        return record

    def set_chain(self, chain_id: str, record: ChainRecord) -> None:
        """Say what a chain id stands for. Chain ids are hashes, so a different record is a mistake: it is replaced."""
        key = layout.chain_ref_key(chain_id)
        self._set(key, ChainRecord, lambda _: record)
        self._try_index(lambda index: index.put_ref(key, record.encode()), None)

    def resolve_chain(self, chain_id: str) -> tuple[str, str, Manifest] | None:
        """The diff id, manifest digest and manifest of a chain's topmost layer; None when it is not in the store.

        Nor is it when what is stored took attributes of directories from the layers of another chain.
        """
        record = self.chain(chain_id)
        found = None if record is None else self.layer(record.diff_id)
        if record is None or found is None:
            return None
        parent = record.parent or ""
        return (record.diff_id, *found) if found[1].labels.get(PARENT_LABEL, parent) == parent else None

    # Images

    def set_image(self, record: ImageRecord) -> None:
        """Store an image's record; its names are added to those it is known by already.

        A name moves: records of the same platform that were `indexed` before this one give its names up, and keep that by
        digest where they have no other of the repository.
        """
        self.ensure_store()
        # Listed first: of two images indexed at once under one name, neither then takes it off the other's new record.
        older = [known for known in self.images() if imagenames.displaces(record, known)]

        def merge(known: ImageRecord | None) -> ImageRecord:
            if known is None:
                return record
            names = tuple(sorted({*known.names, *record.names}))
            same = replace(known, names=names, indexed=record.indexed) == replace(record, names=names)
            # Indexed again without any news: keep the record, and its time, as it is.
            return known if same and names == known.names and not older else replace(record, names=names)

        self._set(layout.image_ref_key(record.manifest_digest), ImageRecord, merge)
        for known in older:
            left = replace(known, names=imagenames.left_of(known, record.names))
            replace_unchanged(self.store, layout.image_ref_key(known.manifest_digest), known, left)

    def image(self, manifest_digest: str) -> ImageRecord:
        """The record of the image with this OCI manifest digest. NotFoundError when it is not indexed."""
        self.check_store()
        key = layout.image_ref_key(manifest_digest)
        data = self._get_or_none(key)
        if data is None:
            raise imagenames.no_image(manifest_digest, self.store.url)
        return ImageRecord.decode(data, key)

    def images(self, damaged: Damaged | None = None) -> Iterator[ImageRecord]:
        """All indexed images, in order of their names. One that cannot be read is left out: logged, or told `damaged`."""
        self.check_store()
        found = (record for _, record in list_records(self.store, layout.IMAGE_REFS, ImageRecord, damaged))
        return iter(sorted(found, key=lambda record: (record.names, record.platform, record.manifest_digest)))

    def find_image(self, text: str) -> ImageRecord:
        """The image with that name (as recorded), OCI manifest digest, or the beginning of such a digest.

        A name that was indexed again stands for the latest record of each platform. NotFoundError when nothing
        matches; BadInputError, listing the candidates, when several images do.
        """
        _, at, digest = text.rpartition("@")
        wanted = digest if at else text
        if wanted.startswith("sha256:") and len(wanted) == len("sha256:") + 64:
            return self.image(wanted)
        return imagenames.find(text, wanted, list(self.images()), self.store.url)

    def remove_image(self, manifest_digest: str) -> None:
        """Remove an image's record, and what says which models it carries; all content is left to garbage collection.

        NotFoundError when the image is neither indexed nor attached. Damaged records go too.
        """
        with suppress(DamagedError):
            if self.attachment(manifest_digest) is None:
                self.image(manifest_digest)
        self.store.delete(layout.image_ref_key(manifest_digest))
        self.store.delete(layout.attachment_ref_key(manifest_digest))

    def forget_image(self, listed: ImageRecord) -> bool:
        """The same for a record that was `listed`, unless it was changed or removed since; whether it was removed."""
        digest = listed.manifest_digest
        removed = remove_unchanged(self.store, layout.image_ref_key(digest), listed)
        if removed:
            self.store.delete(layout.attachment_ref_key(digest))
        return removed

    # Attachments

    def set_attachment(self, record: AttachmentRecord) -> None:
        """Store which models an attached image carries."""
        self._set(layout.attachment_ref_key(record.target), AttachmentRecord, lambda _: record)

    def attachment(self, target: str) -> AttachmentRecord | None:
        """The models of the attached image with this OCI manifest digest; None when there are none."""
        self.check_store()
        key = layout.attachment_ref_key(target)
        data = self._get_or_none(key)
        return None if data is None else AttachmentRecord.decode(data, key)

    # Chunks, for deduplication

    def sync_chunks(self) -> None:
        """Teach the index the packs of the bucket that it does not know, and let it forget those that are gone."""
        self.check_store()
        self._chunks.sync()

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """Let the index know the chunks of a pack just published, without reading them back."""
        self.check_store()
        self._chunks.add_pack(pack_id, chunks)

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """Where chunks are stored, by (digest, length in bytes); those not known are left out.

        As of the last `sync_chunks`, which a push calls first.
        """
        self.check_store()
        return self._chunks.find_chunks(keys)

    # Shared by the above

    def _set_ref(
        self, key: str, statement: Statement, check: Callable[[Ref | None], None] | None = None
    ) -> tuple[Ref | None, Ref]:
        def change(known: Ref | None) -> Ref:
            if check is not None:
                check(known)
            if known is not None and known.manifest == statement.target:
                return self.vouching.sign_ref(statement, known)
            moved = Ref(statement.target, _now())
            if statement.kind == KIND_MODEL:
                moved = replace(moved, by=self._by, before=known.moves[:MOVES_KEPT] if known is not None else ())
            return self.vouching.sign_ref(statement, moved)

        return self._set(key, Ref, change)

    def _set(self, key: str, kind: type[R], change: Callable[[R | None], R]) -> tuple[R | None, R]:
        self.ensure_store()
        return replace_record(self.store, key, kind, change)

    def _get_or_none(self, key: str) -> bytes | None:
        try:
            return bytes(self.store.get(key))
        except NotFoundError:
            return None

    def _try_index(self, work: Callable[[Index], T], otherwise: T) -> T:
        if time.monotonic() < self._index_resting_until:
            return otherwise
        try:
            return work(self.index)
        except UnavailableError as error:
            # A locked index costs seconds for each call: a pull of many layers must not pay for all of them.
            self._index_resting_until = time.monotonic() + _INDEX_REST
            _log.warning("%s", error)
            return otherwise


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _chain_record(chain_id: str, data: bytes, key: str) -> ChainRecord:
    record = ChainRecord.decode(data, key)
    if chain_ids([record.parent, record.diff_id] if record.parent else [record.diff_id])[-1] != chain_id:
        raise DamagedError(f"{key} is the record of another chain", hint=_PUSH_AGAIN)
    return record


def _no_model(ref: ModelRef, url: str) -> NotFoundError:
    return NotFoundError(f"no model {ref} in {url}", hint="`floe model ls` lists the models")
