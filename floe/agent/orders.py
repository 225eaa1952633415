"""Warm orders, and what nodes say of them: JSON in the index's notes, read with care, since others wrote it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from floe.agent.selector import Selector
from floe.store import fields, jsontext
from floe.store.errors import BadInputError, DamagedError, UnsupportedError

FORMAT, VERSION = "floe.warm-order", 1
WARM, CHECK, UNPIN, CANCEL = "warm", "check", "unpin", "cancel"
KINDS = (WARM, CHECK, UNPIN, CANCEL)
NOTE_MAX = 4 << 20  # bytes
TREES_MAX = 256

WAITING, RUNNING, DONE = "waiting", "running", "done"
FULL, INCOMPLETE, FAILED, REFUSED, CANCELLED = "full", "incomplete", "failed", "refused", "cancelled"
FINAL = (DONE, FAILED, REFUSED, CANCELLED, INCOMPLETE)
"""States in which a node does no more about an order. FULL may pass, if others' content goes."""


@dataclass(frozen=True)
class Order:
    """What operators want of the nodes that `nodes` selects, resolved to `trees` when it was given: a tag that moves changes nothing.

    `what`: the model's or image's name, `digest` that of its manifest. `content_bytes`: of all files, 0 when only a
    part is wanted and nodes will know how much. `pin`: keep it, for `reason`.
    `profile_only`: only what starts read first. `deep`: of a check, hash what is there. `by` and `at` (RFC 3339, UTC): who gave it, when.
    `seconds`: for how long it counts, from then on.
    """

    id: str
    kind: str
    what: str
    digest: str
    trees: tuple[str, ...]
    content_bytes: int
    nodes: Selector
    pin: bool = False
    profile_only: bool = False
    deep: bool = False
    reason: str = ""
    by: str = ""
    at: str = ""
    seconds: int = 0

    def encode(self) -> bytes:
        """The note."""
        value = {"format": FORMAT, "version": VERSION, **asdict(self), "nodes": str(self.nodes)}
        return json.dumps(value, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Order:
        """DamagedError for what is no order, UnsupportedError for one of a later form."""
        value = decode_object(data, FORMAT, VERSION)
        try:
            kind = fields.text(value["kind"], "kind")
            if kind not in KINDS:
                raise UnsupportedError(f"a warm order is a {kind!r}", hint="upgrade Floe on this node")
            reason, by, at = (fields.text(value.get(name, ""), name) for name in ("reason", "by", "at"))
            return cls(
                id=fields.text(value["id"], "id"),
                kind=kind,
                what=fields.text(value["what"], "what"),
                digest=fields.text(value["digest"], "digest"),
                trees=fields.each(value["trees"], "trees", fields.hexdigest, most=TREES_MAX),
                content_bytes=fields.count(value["content_bytes"], "content_bytes"),
                nodes=Selector.parse(fields.text(value["nodes"], "nodes")),
                seconds=fields.count(value.get("seconds", 0), "seconds"),
                pin=value.get("pin") is True,
                profile_only=value.get("profile_only") is True,
                deep=value.get("deep") is True,
                reason=reason,
                by=by,
                at=at,
            )
        except (KeyError, ValueError, BadInputError) as error:
            raise DamagedError(f"a warm order cannot be read: {error}") from error


@dataclass(frozen=True)
class Progress:
    """How far a node is with an order. `total_bytes` 0: not known yet; `rate`: bytes a second, lately; `reason`: for people."""

    state: str
    verified_bytes: int = 0
    total_bytes: int = 0
    rate: float = 0.0
    reason: str = ""

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None when nobody can tell."""
        return (self.total_bytes - self.verified_bytes) / self.rate if self.rate > 0 else None

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Progress:
        """ValueError."""
        rate = value.get("rate", 0.0)
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1e15:
            raise ValueError("rate is not a number of bytes a second")
        return cls(
            fields.text(value.get("state"), "state"),
            fields.count(value.get("verified_bytes", 0), "verified_bytes"),
            fields.count(value.get("total_bytes", 0), "total_bytes"),
            float(rate),
            fields.text(value.get("reason", ""), "reason"),
        )


@dataclass(frozen=True)
class Report:
    """What one node says of its orders, by their ids."""

    FORMAT = "floe.warm-report"
    orders: Mapping[str, Progress] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The note."""
        found = {name: asdict(progress) for name, progress in self.orders.items()}
        return json.dumps({"format": self.FORMAT, "version": VERSION, "orders": found}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Report:
        """DamagedError, UnsupportedError."""
        value = decode_object(data, cls.FORMAT, VERSION)
        try:
            found = fields.mapping(value.get("orders"), "orders")
            return cls({name: Progress.of(fields.mapping(item, name)) for name, item in found.items()})
        except ValueError as error:
            raise DamagedError(f"a report of warm orders cannot be read: {error}") from error


def decode_object(data: bytes, kind: str, version: int) -> dict[str, Any]:
    """The JSON object of a note of that format. DamagedError: it is none; UnsupportedError: of another version."""
    try:
        value = jsontext.parse(data, NOTE_MAX)
    except ValueError as error:
        raise DamagedError(f"a note is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != kind:
        raise DamagedError(f"a note is no {kind}")
    if value.get("version") != version:
        raise UnsupportedError(f"a {kind} has the form {value.get('version')!r}", hint="upgrade Floe on this machine")
    return value
