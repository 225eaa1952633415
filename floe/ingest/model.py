"""A model directory into the store, under a name."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from floe.ingest.chunker import shown
from floe.ingest.directory import scan_directory
from floe.ingest.publish import Ingest
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError, UntrustedError
from floe.store.ids import ModelRef, check_text
from floe.store.nodes import Node
from floe.store.packindex import MODEL_FRAME
from floe.store.profiles import ProfileStore, model_source
from floe.store.progress import Progress
from floe.store.records import KIND_MODEL, Manifest


@dataclass(frozen=True)
class PushResult:
    """What a push did. `previous` is the manifest that `ref` named before (equal to `digest`: nothing changed).

    Sizes in bytes: `total_bytes` of content, of which `deduplicated_bytes` were stored already or occur twice;
    `new_bytes` were added to the store in `new_packs` packs. `warnings` say what was left out; `repaired`: frames of damaged packs
    that were made anew, by pack.
    """

    ref: ModelRef
    digest: str
    previous: str | None
    manifest: Manifest
    new_packs: int
    new_bytes: int
    total_bytes: int
    deduplicated_bytes: int
    warnings: tuple[str, ...] = ()
    repaired: Mapping[str, int] = field(default_factory=dict)


def push_model(
    catalog: Catalog,
    directory: Path,
    ref: ModelRef,
    *,
    spool_dir: Path,
    labels: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    only: Collection[bytes] | None = None,
    mtime: int | None = None,
    plain_modes: bool = False,
    source: str | None = None,
) -> PushResult:
    """Store `directory` and let `ref` (NAME:TAG) name it; floe/ingest/directory.py says what is kept of it.

    `only`, `mtime`, `plain_modes`: see scan_directory. `source`: what the manifest says of where it came from, the directory's name without it.
    `verify`: read the packs that it builds upon, and heal those that are damaged; see Ingest. The name is set last: until then, and after any error, it names what it named before. Content that did not change
    keeps its manifest. ConflictError: somebody else moved the name while this push ran; theirs stays. BadInputError,
    NotFoundError, AccessDeniedError, SourceChangedError: the directory; NoSpaceError: `spool_dir`; the store's errors
    otherwise.
    """
    if ref.digest is not None:
        raise BadInputError(f"cannot push to {ref}: a digest names what is stored already", hint="give NAME[:TAG]")
    for key, value in (labels or {}).items():
        check_text(value, f"label {key!r}:")
    scan = scan_directory(directory, only=only, mtime=mtime, plain_modes=plain_modes)
    moved_from = catalog.find_model(ref)
    if progress is not None:
        progress.total(scan.total)
    with Ingest(
        catalog, spool_dir=spool_dir, frame_size=MODEL_FRAME, workers=workers, progress=progress, verify=verify
    ) as ingest:
        scan.read_into(ingest)
        scan.check_unchanged()
        source = source or f"directory:{shown(os.fsencode(directory.resolve().name))}"
        digest, manifest, previous = name_model(
            catalog, ingest, ref, scan.root, source=source, labels=labels, moved_from=moved_from
        )
        stats = ingest.stats
    return PushResult(
        ref,
        digest,
        previous,
        manifest,
        stats.new_packs,
        stats.new_bytes,
        stats.content_bytes,
        stats.deduplicated_bytes,
        tuple(stats.warnings),
        dict(stats.repaired),
    )


def name_model(
    catalog: Catalog,
    ingest: Ingest,
    ref: ModelRef,
    root: Node,
    *,
    source: str,
    labels: Mapping[str, str] | None,
    moved_from: str | None,
) -> tuple[str, Manifest, str | None]:
    """Store the tree `root`, whose content `ingest` has, and let `ref` name it; returns digest, manifest and what it named before.

    `moved_from`: what `find_model` said before the work began. See push_model.
    """
    names = (layout.model_ref_key(ref),)  # a tag that is due to go stays, now that it moves
    previous = _previous(catalog, ref)
    digest, manifest = ingest.finish(root, KIND_MODEL, source, labels, previous=previous, names=names)
    catalog.sign_tree(manifest.tree.digest)
    before = catalog.move_model(ref, digest, moved_from)
    ProfileStore(catalog).seed(manifest.tree.digest, model_source(ref.name))
    return digest, manifest, before


def _previous(catalog: Catalog, ref: ModelRef) -> Manifest | None:
    try:
        return catalog.resolve_model(ref)[1]
    except (NotFoundError, DamagedError, UnsupportedError, UntrustedError):  # there is none to keep
        return None
