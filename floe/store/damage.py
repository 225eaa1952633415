"""Packs in the store that are damaged at rest: who found them writes a record into the store, and who pushes heals them.

A record is advice. Readers verify every frame whether there is one or not, and a push that finds one believes only what it
reads itself. docs/FORMAT.md has the object.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, ClassVar

from floe.store import fields, layout
from floe.store.errors import AccessDeniedError, NotFoundError
from floe.store.objects.base import ObjectStore
from floe.store.records import Record
from floe.store.refs import list_records, replace_record

_log = logging.getLogger(__name__)

# Without --verify a push looks at reported packs alone, and who may only read reports none.
HEALING = "push its model or index its image again with --verify, or run `floe fsck --deep --repair`"
_FRAMES = 4096  # of a pack that are named; a push looks at all of them anyway
_NAMES = 64


@dataclass(frozen=True)
class DamageRecord(Record):
    """A damaged `pack`: its `frames` that do not match, by number (none: it was healed), the `sources` of trees over it, as far as known.

    `node` found it first, at `found` (RFC 3339, UTC).
    """

    FORMAT: ClassVar[str] = "floe.damage"
    REPAIR: ClassVar[str] = "delete it: a node that reads the damage again writes another"

    pack: str
    frames: tuple[int, ...]
    sources: tuple[str, ...]
    node: str
    found: str

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> DamageRecord:
        return cls(
            pack=fields.hexdigest(value["pack"], "pack"),
            frames=fields.each(value["frames"], "frames", fields.count),
            sources=fields.each(value["sources"], "sources", fields.text),
            node=fields.text(value["node"], "node"),
            found=fields.text(value["found"], "found"),
        )


def report(store: ObjectStore, pack_id: str, frames: Iterable[int], sources: Iterable[str], node: str) -> None:
    """Add damage to the pack's record. Raises the store's errors: AccessDeniedError when this node may not write."""

    def add(known: DamageRecord | None) -> DamageRecord:
        if known is None or known.pack != pack_id or not known.frames:
            known = DamageRecord(pack_id, (), (), node, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        return replace(
            known,
            frames=tuple(sorted({*known.frames, *frames})[:_FRAMES]),
            sources=tuple(sorted({*known.sources, *sources})[:_NAMES]),
        )

    replace_record(store, layout.damage_key(pack_id), DamageRecord, add)


def reported(store: ObjectStore) -> dict[str, DamageRecord]:
    """The records of packs that were not healed since, by pack id. Raises the store's errors."""
    found = list_records(store, layout.DAMAGE, DamageRecord)
    return {record.pack: record for key, record in found if record.frames and key == layout.damage_key(record.pack)}


def settle(store: ObjectStore, pack_id: str, left: Iterable[int] = ()) -> None:
    """A pack was looked at: the frames `left` are damaged still, and no others.

    Without any its record goes; where nothing may be deleted, one that names none says the same.
    """
    key, frames = layout.damage_key(pack_id), tuple(left)
    if not frames:
        try:
            store.delete(key)
        except AccessDeniedError:
            pass
        else:
            return
    try:
        known = DamageRecord.decode(store.get(key), key)
    except NotFoundError:
        return
    replace_record(store, key, DamageRecord, lambda record: replace(record or known, frames=frames[:_FRAMES]))


class KnownDamage:
    """Frames that a process found damaged at rest, until it reads them sound; for reports. Thread-safe."""

    def __init__(self) -> None:
        self._frames: dict[str, dict[int, float]] = {}  # replaced, never changed
        self._lock = threading.Lock()
        self.changed = threading.Event()

    def __contains__(self, pack_id: str) -> bool:
        return pack_id in self._frames

    @property
    def frames(self) -> Mapping[str, Mapping[int, float]]:
        """By pack, by frame: when it was found, in seconds since the epoch."""
        return self._frames

    def add(self, pack_id: str, frame: int, now: float) -> None:
        """A frame is damaged."""
        with self._lock:
            known = self._frames.get(pack_id, {})
            if len(known) < _FRAMES:
                self._frames = {**self._frames, pack_id: {frame: now, **known}}
        self.changed.set()

    def remove(self, pack_id: str, frame: int) -> None:
        """A frame arrived sound."""
        with self._lock:
            known = self._frames.get(pack_id, {})
            if frame not in known:
                return
            left = {number: since for number, since in known.items() if number != frame}
            self._frames = {**self._frames, pack_id: left}
            if not left:
                del self._frames[pack_id]
                _log.warning("pack %s is read again where it was damaged: somebody healed it", pack_id)
