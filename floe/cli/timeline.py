"""A start as what happened in it, in order: out of the events of the node's daemons. Pure.

A start is a container's, from the Prepare of its own layer on, with the pull before it where that was just before; or a
mount of a model. Its trees say which other events belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Event = Mapping[str, Any]
_BEFORE = 900.0  # seconds between the pull of a layer and the start that it still belongs to
_MOUNTED = 60.0  # seconds between a tree's mount and the start
_AFTER = 120.0  # seconds that a start lasts which nobody saw end
_RUNNING = 600.0  # seconds after which what a container does is no part of its start
_SLACK = 0.5  # seconds; the daemons' clocks are one, but what they note is noted a moment later
PULL, LAYER, CONTAINER, MOUNT = "pull", "layer", "container", "mount"
FIRST, LAST, STALL, PREFETCH, WORKER = "first read", "last new read", "stall", "prefetch", "worker"
RUNNING, OUTPUT = "running", "first output"


@dataclass(frozen=True)
class Start:
    """`key`: a container as containerd's snapshotters know it, or a mountpoint. `at`: seconds since 1970. `end`: the event `start`.

    `at` is when Prepare began. The worker is told at its end, which is when `end` begins, and counts the reads from there.
    """

    key: str
    name: str
    trees: tuple[str, ...]
    at: float
    end: Event | None = None

    @property
    def id(self) -> str:
        """The container's id, as people know it; or the mountpoint."""
        return self.key if self.key.startswith("/") else self.key.rpartition("/")[2]


class Span(NamedTuple):
    """Something that began `at` seconds from the timeline's beginning and took `seconds` (0: a moment)."""

    at: float
    seconds: float
    kind: str
    what: str
    detail: str = ""
    file: str | None = None
    bytes: int | None = None
    cause: str | None = None


@dataclass(frozen=True)
class Timeline:
    """Of `start`; it begins at `began` (seconds since 1970) and lasts `seconds`. `meanwhile`: counters of the node's worker."""

    start: Start
    began: float
    seconds: float
    spans: tuple[Span, ...]
    meanwhile: Mapping[str, int] = field(default_factory=dict)

    @property
    def stalls(self) -> list[Span]:
        """The longest first."""
        return sorted((span for span in self.spans if span.kind == STALL), key=lambda span: -span.seconds)

    @property
    def waited(self) -> float:
        """Seconds in which at least one read stalled."""
        total = until = 0.0
        for span in self.spans:  # in order
            if span.kind == STALL:
                total += max(0.0, span.at + span.seconds - max(span.at, until))
                until = max(until, span.at + span.seconds)
        return total

    def encode(self) -> dict[str, Any]:
        """As --json shows it; times in seconds."""
        return {
            "key": self.start.key,
            "name": self.start.name or None,
            "trees": list(self.start.trees),
            "began": self.began,
            "seconds": round(self.seconds, 6),
            "over": self.start.end is not None,
            "events": [span._asdict() for span in self.spans],
            "stalls": len(self.stalls),
            "stall_seconds": round(self.waited, 6),
            "meanwhile": dict(self.meanwhile),
        }


def starts(events: Iterable[Event]) -> list[Start]:
    """All starts, the oldest first; `events` in the order in which they happened."""
    found: list[Start] = []
    last: dict[str, int] = {}  # where each key's latest start is among those found
    for event in events:
        kind, key = event["kind"], str(event.get("key", ""))
        name, trees = str(event.get("name") or event.get("image") or ""), tuple(event.get("trees") or ())
        if kind == "prepare" and event.get("outcome") == "container" and trees:
            last[key] = len(found)
            found.append(Start(key, name, trees, event["at"]))
        elif kind in ("begun", "start") and trees:
            # The worker's word for what the snapshotter, or a mount, told it; the end has the time of the beginning.
            near = last.get(key)
            end = event if kind == "start" else None
            if near is None or event["at"] - found[near].at >= _MOUNTED:
                last[key] = len(found)
                found.append(Start(key, name, trees, event["at"], end))
            elif end is not None or not found[near].name:
                one = found[near]
                found[near] = Start(key, one.name or name, one.trees, one.at, end or one.end)
    return sorted(found, key=lambda one: one.at)


def timeline(
    events: Sequence[Event],
    start: Start,
    packs: Mapping[str, str],
    files: Callable[[Sequence[tuple[str, int, int]]], Sequence[Sequence[str]]],
) -> Timeline:
    """What belongs to `start`. `packs`: the tree of each pack of its trees; `files` names those at places of packs."""
    trees = set(start.trees)
    layers = _layers(events, start, trees)
    until = (start.end["at"] + start.end["last_read"] if start.end else start.at + _AFTER) + _SLACK
    mounts = [
        event
        for event in events
        if event["kind"] == "mounted"
        and event.get("tree") in trees
        and (layers[0]["at"] if layers else start.at - _MOUNTED) <= event["at"] <= until
    ]
    began = min([start.at, *(event["at"] for event in (*layers, *mounts))])
    spans = [*_pull(layers, began), *(_layer(event, began) for event in layers)]
    spans += [Span(event["at"] - began, 0.0, MOUNT, f"tree {event['tree'][:12]} is mounted") for event in mounts]
    spans += _beginning(events, start, began)
    spans += _running(events, start, began)
    spans += _stalls(events, packs, files, (began, until))
    for event in events:
        span = _other(event, trees, began, until)
        if span is not None:
            spans.append(span)
    if start.end is not None:
        base = start.end["at"] - began
        read = f"{start.end['reads']} reads of {start.end['bytes']} bytes reached the pack filesystem"
        spans.append(Span(base + start.end["first_read"], 0.0, FIRST, "the first read"))
        spans.append(Span(base + start.end["last_read"], 0.0, LAST, "the last read of something new", read))
    spans = [span._replace(at=round(max(0.0, span.at), 6)) for span in spans]
    spans.sort(key=lambda span: (span.at, -span.seconds))
    seconds = max((span.at + span.seconds for span in spans), default=0.0)
    return Timeline(start, began, seconds, tuple(spans), (start.end or {}).get("meanwhile") or {})


def _layers(events: Iterable[Event], start: Start, trees: set[str]) -> list[Event]:
    """Prepares of its layers in the pull before it, each layer's last."""
    found: dict[str, Event] = {}
    for event in events:
        ours = event.get("tree") in trees or (start.name and event.get("image") == start.name)
        if event["kind"] == "prepare" and event.get("chain") and ours and start.at - _BEFORE <= event["at"] <= start.at:
            found[event["chain"]] = event
    return sorted(found.values(), key=lambda event: float(event["at"]))


def _pull(layers: Sequence[Event], began: float) -> list[Span]:
    if not layers:
        return []
    end = max(event["at"] + event["seconds"] for event in layers)
    return [Span(layers[0]["at"] - began, end - layers[0]["at"], PULL, f"Prepare of {len(layers)} layers")]


def _layer(event: Event, began: float) -> Span:
    how = f"lazily, tree {event['tree'][:12]}" if event.get("tree") and event["outcome"] == "lazy" else event["outcome"]
    parts = [
        f"{name.replace('_', ' ')} {event[f'{name}_seconds']:.3f} s"
        for name in ("look_up", "mount")
        if event.get(f"{name}_seconds")
    ]
    parts += [str(event[key]) for key in ("reason", "detail") if event.get(key)]
    chain = str(event["chain"]).removeprefix("sha256:")[:12]
    return Span(event["at"] - began, event["seconds"], LAYER, f"layer {chain} {how}", ", ".join(parts))


def _beginning(events: Iterable[Event], start: Start, began: float) -> list[Span]:
    for event in events:
        if event["kind"] == "prepare" and event.get("key") == start.key and event["at"] == start.at:
            return [Span(start.at - began, event["seconds"], CONTAINER, f"Prepare of container {start.id}")]
    return [Span(start.at - began, 0.0, CONTAINER, f"{start.name or start.id} at {start.key}")]


def _running(events: Iterable[Event], start: Start, began: float) -> Iterator[Span]:
    """What the container itself did, where somebody told of it (see firstoutput.py)."""
    for event in events:
        if event.get("key") != start.key or not start.at <= event["at"] <= start.at + _RUNNING:
            continue
        if event["kind"] == "running":
            # Told when the runtime has answered, by when the process may have printed something.
            yield Span(event["at"] - began, 0.0, RUNNING, "containerd says that it runs")
        elif event["kind"] == "output":
            yield Span(event["at"] - began, 0.0, OUTPUT, f"the first line on {event['stream']}")


def _stalls(
    events: Iterable[Event],
    packs: Mapping[str, str],
    files: Callable[[Sequence[tuple[str, int, int]]], Sequence[Sequence[str]]],
    within: tuple[float, float],
) -> list[Span]:
    began, until = within
    ours = [e for e in events if e["kind"] == "stall" and e.get("pack") in packs and began - _SLACK <= e["at"] <= until]
    named = files([(event["pack"], event["offset"], event["bytes"]) for event in ours])
    spans = []
    for event, names in zip(ours, named, strict=True):
        file = names[0] if names else None
        what = file or f"pack {event['pack'][:12]} at {event['offset']}"
        more = f", and {len(names) - 1} files beside it" if len(names) > 1 else ""
        reads = f"{event['reads']} reads" if event.get("reads", 1) > 1 else ""
        spans.append(
            Span(
                event["at"] - began,
                event["seconds"],
                STALL,
                what + more,
                ", ".join(filter(None, (reads, event.get("detail")))),
                file,
                event["bytes"],
                event["cause"],
            )
        )
    return spans


def _other(event: Event, trees: set[str], began: float, until: float) -> Span | None:
    """What prefetching did, and what became of workers."""
    kind, at = event["kind"], event["at"]
    if kind == "worker" and began <= at <= until:
        return Span(at - began, 0.0, WORKER, f"a new worker of the pack filesystem, process {event['pid']}")
    if event.get("tree") not in trees or not began - _SLACK <= at <= until + _MOUNTED:
        return None
    tree = str(event["tree"])[:12]
    if kind == "replay" and at <= until:
        return Span(at - began, 0.0, PREFETCH, f"{event['frames']} frames of tree {tree} by its start-up profile")
    if kind == "expected" and at <= until:
        by = "by its start-up profile" if event["profile"] else "from its front"
        return Span(
            at - began, 0.0, PREFETCH, f"{event['frames']} frames of tree {tree} while the image is pulled, {by}"
        )
    if kind == "prefetch":
        missed = event["read"] - event["used"]
        judged = f"of tree {tree}: {event['used']} frames hit, {missed} missed, {event['unused']} fetched in vain"
        return Span(max(0.0, min(at, until) - began), 0.0, PREFETCH, judged, "as found when its recording ended")
    return None
