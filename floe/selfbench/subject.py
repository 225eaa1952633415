"""What there is to read in a store: a model, and packs. Looks only."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass

from floe.selfbench.store import Source, enough, find_objects
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, NotFoundError, UnsupportedError, UntrustedError
from floe.store.ids import ModelRef
from floe.store.records import Manifest

_MODELS = 5  # looked at, to find a large one
_SPOILT = (NotFoundError, DamagedError, UnsupportedError, UntrustedError)  # of a model: another may do


@dataclass(frozen=True)
class Subject:
    """`model` as commands name it, None when the store has none; `packs` are objects to read, none in an empty store."""

    model: str | None
    packs: tuple[Source, ...]

    @property
    def pack_id(self) -> str | None:
        """The largest pack."""
        return self.packs[0].key.rpartition("/")[2] if self.packs else None


def look(catalog: Catalog, wanted: ModelRef | None, size: int) -> Subject:
    """`wanted` and its packs; without it a large model of the first few, and the store's largest packs, `size` bytes.

    NotFoundError: no such model, or no such bucket. The store's errors.
    """
    if wanted is not None:
        _, manifest = catalog.resolve_model(wanted)
        return Subject(str(wanted), tuple(_packs(manifest, size)))
    found: list[tuple[int, str]] = []
    with suppress(NotFoundError):  # nothing is stored there yet; a bucket that is missing fails below
        for ref, _ in itertools.islice(catalog.models(lambda _key, _error: None), _MODELS):
            with suppress(*_SPOILT):
                _, manifest = catalog.resolve_model(ref)
                found.append((manifest.sizes.content, str(ref)))
    packs = find_objects(catalog.store, layout.PACKS, size)
    return Subject(max(found)[1] if found else None, tuple(packs))


def _packs(manifest: Manifest, size: int) -> list[Source]:
    return enough((Source(layout.pack_key(pack.id), pack.stored_size) for pack in manifest.packs), size)
