"""Content to the store: chunks are deduplicated, packed, uploaded; then the tree, then the manifest.

Nothing refers to an object before it is there: pack, chunk table, index (for each pack), all packs before the tree, those
that another ingest of the session writes included; the tree before the manifest; the caller sets the ref last. A crash at
any point leaves objects that nothing names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import repeat
from pathlib import Path
from types import TracebackType

from floe.ingest import repack
from floe.ingest.chunker import (
    Identity,
    Readable,
    changed,
    check_size,
    file_pieces,
    identity,
    is_zeros,
    open_file,
    piece_lengths,
    read_exactly,
    shown,
    stream_pieces,
)
from floe.ingest.entries import Chunk, FileContent, Node, chunk_bits, tree_sizes
from floe.ingest.hotcontent import HotContent
from floe.ingest.packwriter import PackWriter, SealedPack
from floe.ingest.repair import Repairs
from floe.ingest.reuse import Reuse
from floe.ingest.session import ChunkKey, Claim, Claimant, Session
from floe.ingest.spool import Spool
from floe.ingest.treeout import make_image, put_tree
from floe.ingest.uploads import Uploads
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs import MAX_DEVICES, read_device_table
from floe.store.errors import BadInputError
from floe.store.ids import digest, hexdigest
from floe.store.index.base import ChunkPlace
from floe.store.nodes import CHUNK
from floe.store.packindex import BLOCK, MAX_CONTENT
from floe.store.progress import Progress
from floe.store.records import Manifest, TreeEntry

_BATCH_BYTES = 16 << 20  # content looked up at once; up to twice as much is held: one batch is hashed, the next read
_BATCH_COUNT = 2048  # pieces looked up at once
_INLINE = 64 << 10  # bytes; hashing these is faster than handing them to another thread
_NICER = 5


@dataclass
class IngestStats:
    """What a push did so far, in bytes and packs. `deduplicated_bytes` were found in the store or seen before.

    `hot_bytes` were laid out together, of which `copied_bytes` were in the store already, scattered. `repaired`: frames of
    packs that were damaged in the store, by pack.
    """

    content_bytes: int = 0
    deduplicated_bytes: int = 0
    hole_bytes: int = 0
    new_packs: int = 0
    new_bytes: int = 0
    hot_bytes: int = 0
    copied_bytes: int = 0
    repaired: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Piece:
    chunk: Chunk
    data: bytes
    hashing: Future[bytes] | None
    rank: int | None = None  # among the hot files


class Ingest:
    """One tree's way into the store; a context manager. One thread calls it; it works with `workers` others.

    `catalog`: where to; its store is created when there is none. `spool_dir`: local disk for up to three packs (12 GiB).
    `session`: shared with the ingests that work side by side with this one, which store common content once.
    `frame_size`: LAYER_FRAME or MODEL_FRAME. `progress`: see Progress. `sync`: learn first which chunks the store
    holds (skip it when the catalog did so a moment ago). `laid_out`: where an earlier version's hot content is. `verify`: read
    the packs that are built upon, and heal them where they are damaged (see repair.py); those reported are in any case. Memory
    stays below some 200 MiB and 400 bytes a file.

    Leaving it without `finish` (an error, say) publishes no tree; packs already uploaded are named by nothing, and a
    later push of the same content finds their chunks.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        spool_dir: Path,
        frame_size: int,
        workers: int | None = None,
        progress: Progress | None = None,
        sync: bool = True,
        session: Session | None = None,
        laid_out: Mapping[ChunkKey, ChunkPlace] | None = None,
        verify: bool = False,
        max_pack: int = MAX_CONTENT,
        max_packs: int = MAX_DEVICES,
    ) -> None:
        catalog.ensure_store()
        if sync:
            catalog.sync_chunks()
        self.stats = IngestStats()
        self._catalog, self._store = catalog, catalog.store
        self._progress = progress
        self._max_pack, self._max_packs = max_pack, max_packs
        self._session = session or Session(catalog.store)
        self._own_session = session is None
        self._packs, self._claims = self._session.packs, self._session.claims
        self._claimant = Claimant()
        # Who signs believes nobody about what the store holds.
        self._reuse = Reuse(self._store) if catalog.vouching.signer else None
        self._stopping = threading.Event()
        self._spool = Spool(spool_dir, self._session.room, self._stopped)
        try:
            self._repairs = Repairs(catalog.store, self._session.examiner, self._spool.path, verify=verify)
        except BaseException:
            self._spool.close()
            raise
        self._pool = ThreadPoolExecutor(
            workers or os.cpu_count() or 2, thread_name_prefix="floe-ingest", initializer=_yield_to_readers
        )
        self._uploads = Uploads(catalog, self._session, self._spool, self._stopped)
        self._writer = PackWriter(self._spool, frame_size, self._pool, self._upload_later, max_content=max_pack)
        self._hot, self._laid_out = HotContent(self._spool.path), laid_out or {}
        self._batch: list[_Piece] = []
        self._batch_bytes = 0
        self._before: list[_Piece] = []  # the batch before it, being hashed
        self._chunks: dict[tuple[bytes, int], Chunk] = {}
        self._twins: list[tuple[Chunk, Chunk]] = []
        self._borrowed: list[tuple[Chunk, Chunk, Claimant]] = []  # mine, theirs, who stores it
        self._own: dict[str, int] = {}  # packs of this ingest, and their blocks of content

    def __enter__(self) -> Ingest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, an upload under way included, and remove what is spooled."""
        self._stopping.set()
        self._claims.fail(self._claimant, self._chunks)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._uploads.close()
        self._writer.discard()
        self._hot.close()
        self._spool.close()
        if self._own_session:
            self._session.close()

    def _stopped(self) -> bool:
        return self._stopping.is_set() or self._session.stopping

    # Content in

    def add_stream(
        self, readable: Readable, size: int, name: str = "the stream", *, rank: int | None = None
    ) -> FileContent:
        """The next `size` bytes of `readable` as a file's content.

        Chunks have their places only after `finish`. BadInputError when the stream, called `name`, ends early.
        Files with a `rank` (they have less than a full chunk) are laid out side by side, in its order.
        """
        check_size(size, name)

        def short(missing: int) -> BadInputError:
            return BadInputError(f"{name} ends {missing} bytes early")

        if 0 < size <= CHUNK:  # most files of a layer
            data = read_exactly(readable, size)
            if len(data) < size:
                raise short(size - len(data))
            piece = None if is_zeros(data) else data
            return FileContent(size, chunk_bits(size), (self._add_piece(piece, size, rank),))
        return self._content(stream_pieces(readable, size, short), size, rank)

    def add_file(self, path: str | bytes | Path, expected: Identity | None = None) -> FileContent:
        """A regular file's content. A symlink is not followed.

        SourceChangedError when it is not (or no longer) the file `expected`, or changes, shrinks or vanishes while
        it is read; AccessDeniedError names a file that may not be read.
        """
        raw = os.fsencode(path)
        descriptor = open_file(raw)
        try:
            before = os.fstat(descriptor)
            if expected not in (None, identity(before)):
                raise changed(raw)
            size = before.st_size
            check_size(size, shown(raw))
            content = self._content(file_pieces(descriptor, size, raw), size)
            if identity(before) != identity(os.fstat(descriptor)):
                raise changed(raw)
        finally:
            os.close(descriptor)
        return content

    def _content(self, pieces: Iterator[bytes | None], size: int, rank: int | None = None) -> FileContent:
        # The pieces come first in `map`, so that they are read to their end, where what they are of is checked.
        added = map(self._add_piece, pieces, piece_lengths(size), repeat(rank))
        return FileContent(size, chunk_bits(size), tuple(added))

    def _add_piece(self, data: bytes | None, length: int, rank: int | None) -> Chunk | None:
        self.stats.content_bytes += length
        if self._progress is not None:
            self._progress.advance(length)
        if data is None:
            self.stats.hole_bytes += length
            return None
        small = length <= _INLINE
        chunk = Chunk(digest(data) if small else b"", length)
        self._batch.append(_Piece(chunk, data, None if small else self._pool.submit(digest, data), rank))
        self._batch_bytes += length
        if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_COUNT:
            self._next_batch()
        return chunk

    def _next_batch(self) -> None:
        """Settle the batch before this one: its digests are there by now, so that the pool never waits for this thread."""
        before, self._before = self._before, self._batch
        self._batch, self._batch_bytes = [], 0
        self._settle_batch(before)

    def _settle(self) -> None:
        while self._before or self._batch:
            self._next_batch()

    def _settle_batch(self, batch: list[_Piece]) -> None:
        """Decide for each piece whether it is stored already, in order of arrival."""
        for piece in batch:
            if piece.hashing is not None:
                piece.chunk.digest = piece.hashing.result()
        places, lent = self._look_up({(p.chunk.digest, p.chunk.length): p for p in reversed(batch)})
        for piece in batch:
            chunk, key = piece.chunk, (piece.chunk.digest, piece.chunk.length)
            first = self._chunks.setdefault(key, chunk)
            if first is not chunk:
                self._twins.append((chunk, first))
            elif key in places:
                place = places[key]
                if piece.rank is not None and key in self._laid_out and self._is_there(self._laid_out[key], piece):
                    place = self._laid_out[key]
                chunk.pack_id, chunk.block = place.pack_id, place.block
                self._repairs.examine(place.pack_id)
                # On what is damaged: it may be stored anew, see _seal_rest.
                relies = self._repairs.take(chunk, piece.data)
                if not relies and piece.rank is not None and self._hot.add(piece.rank, chunk, piece.data):
                    continue  # it may be stored once more
            elif key in lent:
                self._borrowed.append((chunk, *lent[key]))
            else:
                self._repairs.take(chunk, piece.data)
                if piece.rank is None or not self._hot.add(piece.rank, chunk, piece.data):
                    self._writer.add(chunk, piece.data)
                continue
            self.stats.deduplicated_bytes += chunk.length

    def _look_up(self, found: dict[ChunkKey, _Piece]) -> tuple[dict[ChunkKey, ChunkPlace], dict[ChunkKey, Claim]]:
        """Of chunks not met before: the places of those in the store, and those that others store; the rest is claimed."""
        wanted = {key: piece for key, piece in found.items() if key not in self._chunks}
        while True:
            settled = self._claims.settled
            places = self._catalog.find_chunks(wanted)
            packs = {place.pack_id for place in places.values()}
            self._packs.protect(packs)
            usable = {p for p, entry in zip(packs, self._pool.map(self._packs.find, packs), strict=True) if entry}
            stored = {key: place for key, place in places.items() if place.pack_id in usable}
            if self._reuse is not None:
                there = self._pool.map(self._is_there, stored.values(), [wanted[key] for key in stored])
                stored = {key: stored[key] for key, same in zip(tuple(stored), there, strict=True) if same}
            missing = {key: piece.chunk for key, piece in wanted.items() if key not in stored}
            lent = self._claims.claim(self._claimant, missing, settled)
            if lent is not None:
                return stored, lent

    def _is_there(self, place: ChunkPlace, piece: _Piece) -> bool:
        return self._reuse is None or self._reuse.holds(place, piece.data)

    # Packs out

    def _upload_later(self, pack: SealedPack) -> None:
        self._own[pack.id] = pack.index.content_size // BLOCK
        self.stats.new_packs += 1
        self.stats.new_bytes += pack.index.stored_size
        self._uploads.add(pack)

    def flush(self) -> None:
        """Store all content taken so far; none may follow.

        `finish` does so too. Whoever waits for another ingest of the session in between calls it first: others may
        wait for this content, or for the room it takes.
        """
        if self._claimant.stored.done():
            return
        self._seal_rest()
        self._store_rest()
        self._claims.stored(self._claimant, self._chunks)

    def _seal_rest(self) -> None:
        """All content is in packs, on their way to the store, afterwards; chunks that nobody else stores have their places."""
        self._settle()
        for chunk, data in self._repairs.finish():
            chunk.pack_id, chunk.block = "", 0
            self.stats.deduplicated_bytes -= chunk.length
            self._writer.add(chunk, data)
        self.stats.repaired.update(self._repairs.frames)
        hot = self._hot.lay_out(self._writer)
        self.stats.hot_bytes += hot.written
        self.stats.copied_bytes += hot.copied
        self.stats.deduplicated_bytes += hot.kept
        self._limit_packs()
        self._writer.seal()

    @property
    def hot_packs(self) -> tuple[str, ...]:
        """The packs in which hot content lies together, once it is stored."""
        return self._hot.packs

    def leave(self) -> None:
        """No tree is wanted after all: store only what other ingests of the session rely on."""
        if not self._claims.withdraw(self._claimant, self._chunks):
            self.flush()

    def _limit_packs(self) -> None:
        repack.limit_packs(
            self._chunks.values(),
            self._own,
            self._writer,
            self._store,
            limit=self._max_packs,
            max_pack=self._max_pack,
        )

    def _store_rest(self) -> None:
        self._writer.seal()
        self._uploads.wait()

    def _take_over(self) -> None:
        """Wait for the content that others store, and learn where it is."""
        for chunk, theirs, lender in self._borrowed:
            lender.stored.result()
            chunk.pack_id, chunk.block = theirs.pack_id, theirs.block
        if self._borrowed:  # their packs count as well
            self._limit_packs()
            self._store_rest()

    # The tree

    def finish(
        self,
        root: Node,
        kind: str,
        source: str,
        labels: Mapping[str, str] | None = None,
        *,
        previous: Manifest | None = None,
        names: Iterable[str] = (),
    ) -> tuple[str, Manifest]:
        """Upload what is left, wait for what others of the session store for it, then upload the tree of `root`, then its manifest: (manifest digest, manifest).

        `names`: keys of refs that will name it, protected with it. When `previous` says the same but for where and when it was made, it is what is returned, so that pushing the
        same thing again changes nothing. `stats` is complete afterwards, with a warning for each thing left out.
        """
        if not self._claimant.stored.done():
            self._seal_rest()
        # The tree is made while the last packs go out, unless places are still missing.
        made = None if self._borrowed else self._make_image(root)
        self.flush()
        self._take_over()
        image, warnings = made or self._make_image(root)
        self.stats.warnings += warnings
        tree = hexdigest(image)
        packs = tuple(self._packs.get(pack_id) for pack_id, _ in read_device_table(image))
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        manifest = Manifest(
            kind, TreeEntry(tree, len(image)), packs, tree_sizes(root), source, created, dict(labels or {})
        )
        if previous is not None and replace(previous, created=created, source=source) == manifest:
            manifest = previous
        self._session.protection.protect((layout.tree_key(tree), layout.manifest_key(manifest.digest), *names))
        put_tree(self._store, image, tree)
        return self._catalog.put_manifest(manifest), manifest

    def _make_image(self, root: Node) -> tuple[bytes, list[str]]:
        for twin, first in self._twins:
            twin.pack_id, twin.block = first.pack_id, first.block
        return make_image(root, lambda pack_id: self._own.get(pack_id) or self._packs.blocks(pack_id))


def _yield_to_readers() -> None:
    """Let this thread run behind those that give it work: on few cores they would else wait for it to give it more."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICER))
