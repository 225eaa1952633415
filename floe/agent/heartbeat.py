"""What a node says of itself, and what becomes of that when it falls silent. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from floe.agent.orders import decode_object
from floe.store import fields
from floe.store.errors import DamagedError

FORMAT, VERSION = "floe.heartbeat", 1
UP, STOPPED, LOST = "up", "stopped", "lost"
MISSED = 3  # intervals of silence, after which a node counts as lost
_ALL_SILENT = 12  # the same when nobody else is heard: then it may be the index that is away
_SHORTEST = 0.01  # seconds
KEPT = 3600.0  # seconds that a silent node is remembered, at the least
_KEPT_INTERVALS = 60
_LONGEST = 1e9  # seconds; what is more is nonsense


@dataclass(frozen=True)
class Heartbeat:
    """One node. `interval`: seconds between two of these; `state`: UP, or STOPPED when its agent was ended in good order.

    `versions`: of floe, containerd, kernel. `health`: by daemon, "running" or what is wrong. `cache`: sizes in bytes.
    `mounted`: the trees in use, each with `tree`, `model`, `state`, `here_bytes`, `content_bytes`. `trees`: by digest, whether all
    packs of a tree that is here are complete. `pins`: what warm orders keep here. `gap`: the longest time, in seconds, between
    any two of its last heartbeats that the index took: long on all nodes when the index was away.
    """

    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    interval: float = 10.0
    gap: float = 0.0
    state: str = UP
    started: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    health: Mapping[str, str] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    mounted: tuple[Mapping[str, Any], ...] = ()
    trees: Mapping[str, bool] = field(default_factory=dict)
    pins: tuple[Mapping[str, Any], ...] = ()

    @property
    def kept(self) -> float:
        """Seconds after which the index may forget this node."""
        return max(KEPT, _KEPT_INTERVALS * self.interval)

    def encode(self) -> bytes:
        """The note."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Heartbeat:
        """DamagedError, UnsupportedError."""
        value = decode_object(data, FORMAT, VERSION)
        try:
            return cls(
                node=fields.text(value["node"], "node"),
                labels=fields.texts(value.get("labels", {}), "labels"),
                interval=max(_SHORTEST, _seconds(value, "interval")),
                gap=_seconds(value, "gap"),
                state=fields.text(value.get("state"), "state"),
                started=fields.text(value.get("started", ""), "started"),
                versions=fields.texts(value.get("versions", {}), "versions"),
                health=fields.texts(value.get("health", {}), "health"),
                cache=fields.mapping(value.get("cache", {}), "cache"),
                mounted=fields.each(value.get("mounted", []), "mounted", fields.mapping),
                trees={
                    fields.hexdigest(tree, "trees"): whole is True
                    for tree, whole in fields.mapping(value.get("trees", {}), "trees").items()
                },
                pins=fields.each(value.get("pins", []), "pins", fields.mapping),
            )
        except (KeyError, ValueError) as error:
            raise DamagedError(f"a heartbeat cannot be read: {error}") from error


@dataclass(frozen=True)
class Seen:
    """A heartbeat that is `age` seconds old, by the index's clock."""

    beat: Heartbeat
    age: float


def state_of(seen: Seen, all_nodes: Mapping[str, Seen]) -> str:
    """UP, STOPPED or LOST.

    A node is lost when it missed MISSED heartbeats that others could give. While nobody is heard the index itself may be away, in a
    fail-over for example: no node is called lost for that until _ALL_SILENT have passed. When it is back, those that are heard
    first tell by their gaps for how long nobody was, and the others get that time on top.
    """
    if seen.beat.state == STOPPED:
        return STOPPED
    interval = seen.beat.interval
    if seen.age <= MISSED * interval:
        return UP
    gaps = [
        other.beat.gap - other.beat.interval
        for other in all_nodes.values()
        if other.beat.state == UP and other.age <= MISSED * other.beat.interval
    ]
    allowed = MISSED * interval + max(0.0, min(gaps)) if gaps else _ALL_SILENT * interval
    return UP if seen.age <= allowed else LOST


def _seconds(value: Mapping[str, Any], name: str) -> float:
    found = value.get(name, 0.0)
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 <= found < _LONGEST:
        raise ValueError(f"{name} is not a number of seconds")
    return float(found)
