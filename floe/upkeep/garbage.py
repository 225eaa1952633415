"""What lies in a store that nobody needs, found by listing; and since when collectors have seen it there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from floe.store import fields, layout
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError
from floe.store.objects.base import ObjectStore
from floe.store.records import Record

PACK = "packs"
KINDS = {
    layout.CHAIN_REFS: "chain records",
    layout.LAYER_REFS: "layers",
    layout.MANIFESTS: "manifests",
    layout.TREES: "trees",
    layout.TREE_PROFILES: "profiles",
    layout.SOURCE_PROFILES: "profiles",
    layout.SOURCE_LAYOUTS: "layout records",
    layout.PACKS: PACK,
}
"""Prefixes in the order in which what is below them is removed: what names others goes before what it names."""
LEFTOVERS = ("checks", "bench")


@dataclass
class Unit:
    """What is removed as one: an object, a tree with its signatures, or a pack with its index, chunk table and damage record. `size` in bytes, `modified` the latest."""

    kind: str
    size: int
    modified: float


def find_garbage(store: ObjectStore, needed: Collection[str]) -> dict[str, Unit]:
    """Units by key, in the order of their removal, of what is not `needed`; what Floe does not write there is left out.

    Streams the listings: memory is for what is garbage, some 200 bytes each.
    """
    found: dict[str, Unit] = {}
    for prefix, kind in KINDS.items():
        below = _BELOW.get(prefix, (prefix,))
        for folder in below:
            for info in store.list(folder):
                key = unit_of(info.key)
                if key is None or key in needed:
                    continue
                unit = found.setdefault(key, Unit(kind, 0, 0.0))
                unit.size += info.size
                unit.modified = max(unit.modified, info.modified)
    return found


def unit_of(key: str) -> str | None:
    """The key of the unit that the object at `key` belongs to; None when Floe writes no such object."""
    prefix, _, name = key.rpartition("/")
    try:
        for folder, made in _MAKERS.items():
            if key.startswith(f"{folder}/"):
                return layout.pack_key(name) if made in _OF_PACKS and made(name) == key else _same(made(name), key)
        for folder in (layout.LAYER_REFS, layout.CHAIN_REFS):
            if prefix == f"{folder}/sha256":
                made = layout.layer_ref_key if folder == layout.LAYER_REFS else layout.chain_ref_key
                return _same(made(f"sha256:{name}"), key)
        if prefix.startswith(f"{layout.TREE_SIGNATURES}/"):
            return layout.tree_key(name) if layout.tree_signatures_key(name) == key else None
        if prefix.startswith((f"{layout.SOURCE_PROFILES}/", f"{layout.SOURCE_LAYOUTS}/")):
            return key if layout.tree_key(name).endswith(f"/{name[:2]}/{name}") else None
    except BadInputError:
        return None
    return None


_BELOW = {
    layout.PACKS: (layout.PACKS, layout.PACK_INDEXES, layout.CHUNK_TABLES, layout.DAMAGE),
    layout.TREES: (layout.TREES, layout.TREE_SIGNATURES),
}
_OF_PACKS = (layout.pack_key, layout.pack_index_key, layout.chunk_table_key, layout.damage_key)
_MAKERS = {
    layout.PACKS: layout.pack_key,
    layout.PACK_INDEXES: layout.pack_index_key,
    layout.CHUNK_TABLES: layout.chunk_table_key,
    layout.DAMAGE: layout.damage_key,
    layout.TREES: layout.tree_key,
    layout.MANIFESTS: layout.manifest_key,
    layout.TREE_PROFILES: layout.tree_profile_key,
}


def _same(made: str, key: str) -> str | None:
    return key if made == key else None


def objects_of(unit: str) -> tuple[str, ...]:
    """The keys to delete for a unit, in order: without its index a pack is none, to pushes and readers alike."""
    name = unit.rpartition("/")[2]
    if unit.startswith(f"{layout.TREES}/"):
        return (unit, layout.tree_signatures_key(name))
    if not unit.startswith(f"{layout.PACKS}/"):
        return (unit,)
    return (layout.pack_index_key(name), layout.chunk_table_key(name), unit, layout.damage_key(name))


def leftovers(store: ObjectStore) -> Iterator[tuple[str, int, float]]:
    """Key, size and time of what `floe store check` and `floe bench` left."""
    for prefix in LEFTOVERS:
        for info in store.list(prefix):
            yield info.key, info.size, info.modified


@dataclass(frozen=True)
class Marks(Record):
    """What the last collector found unneeded: `seen` holds, by the second in which a collector saw it first, keys."""

    FORMAT: ClassVar[str] = "floe.marks"
    REPAIR: ClassVar[str] = "delete it: grace periods begin anew"

    seen: dict[str, tuple[str, ...]]

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Marks:
        groups = fields.mapping(value["seen"], "seen")
        return cls({str(int(at)): fields.each(keys, f"seen.{at}", fields.text) for at, keys in groups.items()})

    @classmethod
    def of(cls, since: Iterable[tuple[str, float]]) -> Marks:
        """From keys and times; a part of a second counts as begun, so that nothing grows older by it."""
        seen: dict[str, list[str]] = {}
        for key, at in since:
            seen.setdefault(str(math.ceil(at)), []).append(key)
        return cls({at: tuple(sorted(keys)) for at, keys in seen.items()})

    def times(self) -> dict[str, float]:
        """When each key was first seen unneeded, in POSIX seconds."""
        return {key: float(at) for at, keys in self.seen.items() for key in keys}


def read_marks(store: ObjectStore) -> dict[str, float]:
    """See Marks.times; nothing when there are none, or none that can be read."""
    try:
        return Marks.decode(store.get(layout.MARKS_KEY), layout.MARKS_KEY).times()
    except (DamagedError, UnsupportedError):
        return {}
    except NotFoundError as error:
        if error.hint:  # the bucket is missing
            raise
        return {}
