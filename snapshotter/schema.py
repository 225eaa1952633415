"""The snapshot database's layout, and a row of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

SCHEMA_VERSION = 2

SCHEMA = """
CREATE TABLE snapshots (
  -- Names the directory <root>/s/<id>; counts up and is never used twice.
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  -- containerd's key or name, opaque; unique among snapshots that are not doomed.
  name    TEXT NOT NULL,
  -- id of the parent; 0: none. Whoever has a living child is committed and not doomed.
  parent  INTEGER NOT NULL,
  -- 1 view, 2 active, 3 committed: containerd's numbers.
  kind    INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
  -- 'live': containerd sees it. 'making': a lazy snapshot being mounted, seen by nobody; after a crash it is doomed.
  -- 'doomed': removed, its mounts and directories still to be given back by Cleanup.
  state   TEXT NOT NULL CHECK (state IN ('live', 'making', 'doomed')),
  -- JSON object of texts; no value is empty.
  labels  TEXT NOT NULL,
  -- Nanoseconds since 1970, UTC. Commit sets both anew, Update the second.
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  -- Lazy snapshots: the chain id asked for; NULL: an ordinary one.
  chain   TEXT,
  -- Digest of the tree whose bind is <root>/s/<id>/fs. Set exactly when chain is.
  tree    TEXT,
  -- Ordinary stub layers: digest of the model tree that stands in for it at <root>/s/<id>/m; NULL: none.
  model   TEXT,
  -- 1: the layer is the stub and nothing else, `model` replaces it. 0: `model` lies above it.
  alone   INTEGER NOT NULL DEFAULT 0,
  -- 1: containerd changed the owners of all files in it for a user namespace (see mounts.is_remap). From version 2 on.
  remapped INTEGER NOT NULL DEFAULT 0,
  -- Disk usage in bytes and inodes, of committed ordinary snapshots; NULL: not measured yet.
  size    INTEGER,
  inodes  INTEGER
);
CREATE UNIQUE INDEX snapshots_name ON snapshots (name) WHERE state = 'live';
CREATE INDEX snapshots_parent ON snapshots (parent) WHERE state != 'doomed';
-- Two namespaces may ask for one chain id above different parents.
CREATE UNIQUE INDEX snapshots_lazy ON snapshots (chain, parent) WHERE state = 'live' AND chain IS NOT NULL;
"""
# What brings a database of the version before to each version.
MIGRATIONS = {2: "ALTER TABLE snapshots ADD COLUMN remapped INTEGER NOT NULL DEFAULT 0;"}
COLUMNS = "id, name, parent, kind, labels, created, updated, chain, tree, model, alone, remapped, size, inodes"


class Kind(IntEnum):
    """containerd's kinds of snapshot; `label` is the word its filters use."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3

    @property
    def label(self) -> str:
        """The word: view, active or committed."""
        return self.name.lower()


@dataclass(frozen=True)
class Snapshot:
    """One row; see SCHEMA. `parent` is an id (0: none), `parent_name` that parent's name ("" for none)."""

    id: int
    name: str
    parent: int
    parent_name: str
    kind: Kind
    labels: Mapping[str, str]
    created: int
    updated: int
    chain: str | None = None
    tree: str | None = None
    model: str | None = None
    alone: bool = False
    remapped: bool = False
    size: int | None = None
    inodes: int | None = None


def snapshot_of(row: Sequence[Any]) -> Snapshot:
    """A row of COLUMNS and the parent's name."""
    (ident, name, parent, kind, labels, created, updated, chain, tree, model, alone, remapped, size, inodes, above) = (
        row
    )
    return Snapshot(
        id=ident,
        name=name,
        parent=parent,
        parent_name=above or "",
        kind=Kind(kind),
        labels=json.loads(labels),
        created=created,
        updated=updated,
        chain=chain,
        tree=tree,
        model=model,
        alone=bool(alone),
        remapped=bool(remapped),
        size=size,
        inodes=inodes,
    )


def dump_labels(labels: Mapping[str, str]) -> str:
    """Labels as stored: containerd drops those with an empty value."""
    return json.dumps({key: value for key, value in labels.items() if value}, ensure_ascii=False, sort_keys=True)
