"""Packs and chunks in Redis: loading what is known, looking up, adding, removing. One operation each, no retries."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from floe.store.errors import UnavailableError
from floe.store.ids import DIGEST_BYTES
from floe.store.index.base import ChunkPlace
from floe.store.index.redis import keys as layout
from floe.store.index.redis.errors import lasting
from floe.store.index.redis.facts import Facts
from floe.store.index.redis.keys import EVICTED, MARKER, PREFIX_BYTES, TAGS, Keys
from floe.store.packindex import ChunkEntry

if TYPE_CHECKING:
    from floe.store.index.redis.connecting import Server

T = TypeVar("T")
_PER_SCRIPT = 500  # fields that one script looks at or writes: it holds up other clients for less than a millisecond
_PER_PIPELINE = 20_000  # the same for a pipeline: some 2 MB on their way
_HASHES_PER_SWEEP = 16
_PACKS_PER_SWEEP = 512


@dataclass
class Known:
    """What one load found: the `generation`, and by their ids' first bytes the `packs` that are all in the index."""

    generation: bytes
    packs: dict[bytes, str]
    strangers: set[bytes] = field(default_factory=set)  # first bytes of ids that no pack of this generation has


def load(server: Server, keys: Keys, facts: Facts, url: str) -> tuple[Known, bool]:
    """Read all packs; where a tag's marker is missing a new generation begins (True), in which no pack is known yet.

    UnavailableError when the servers evicted keys and still do: what they know has holes then.
    """
    tables = read_tables(server, keys)
    markers = [table.get(MARKER, b"") for table in tables]
    _check_owner(markers, keys, url)
    holes = facts.evicted_since(_recorded(tables[0].get(EVICTED)))
    if holes and facts.evicts:
        raise lasting(
            f"index {url} has dropped keys (maxmemory-policy {facts.policy})",
            hint="set its maxmemory-policy to noeviction; the next push then fills it again",
        )
    anew = holes or not all(markers)
    if anew:
        markers = _begin(server, keys, markers, facts if holes or not markers[0] else None, url)
    known, stale = sort_packs(tables, layout.generation(markers))
    _delete(server, ((keys.packs(first[0]), first) for first in stale))
    return known, anew


def read_tables(server: Server, keys: Keys) -> list[dict[bytes, bytes]]:
    """The hashes of packs, of all tags."""
    pipe = server.pipeline()
    for tag in range(TAGS):
        pipe.hgetall(keys.packs(tag))
    found: list[dict[bytes, bytes]] = pipe.execute()
    return found


def sort_packs(tables: Iterable[Mapping[bytes, bytes]], generation: bytes) -> tuple[Known, list[bytes]]:
    """What counts in this generation, and the first bytes of the ids of packs that do not."""
    known, stale = Known(generation, {}), []
    for table in tables:
        for first, rest in table.items():
            if len(first) != PREFIX_BYTES:
                continue
            if (pack_id := _pack_id(first, rest, generation)) is not None:
                known.packs[first] = pack_id
            else:
                stale.append(first)
    return known, stale


def _pack_id(first: bytes, rest: bytes, generation: bytes) -> str | None:
    """The id of a pack recorded in this generation; None for any other value."""
    whole = len(rest) == DIGEST_BYTES - PREFIX_BYTES + len(generation) and rest.endswith(generation)
    return (first + rest[: DIGEST_BYTES - PREFIX_BYTES]).hex() if whole else None


def _check_owner(markers: Iterable[bytes], keys: Keys, url: str) -> None:
    if not all(keys.owns(marker) for marker in markers if marker):
        raise lasting(
            f"index {url} holds another store's data under this store's keys", hint="give one of them another prefix="
        )


def _recorded(value: bytes | None) -> dict[str, int]:
    try:
        found = json.loads(value or b"{}")
        return {str(run_id): int(count) for run_id, count in found.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def _begin(server: Server, keys: Keys, markers: Sequence[bytes], facts: Facts | None, url: str) -> list[bytes]:
    """Give each tag without a marker one; with `facts`, tag 00 in any case, and note what was evicted before."""
    pipe = server.pipeline()
    for tag, marker in enumerate(markers):
        if not marker:
            # Of several pushes that notice at once, one wins; the others read its marker below.
            pipe.hsetnx(keys.packs(tag), MARKER, keys.new_marker())
    if facts is not None:
        fields = {EVICTED: json.dumps(dict(facts.evicted))}
        pipe.hset(keys.packs(0), mapping=fields if not markers[0] else {**fields, MARKER: keys.new_marker()})
    pipe.execute()
    fresh = read_markers(server, keys)
    if not all(fresh):
        raise UnavailableError(f"index {url} loses what is written to it", hint="`floe status` shows its state")
    _check_owner(fresh, keys, url)
    return fresh


def read_markers(server: Server, keys: Keys) -> list[bytes]:
    """The markers of all tags, b"" where there is none."""
    pipe = server.pipeline()
    _ask_markers(pipe, keys)
    return [marker or b"" for marker in pipe.execute()]


def _ask_markers(pipe: Any, keys: Keys) -> None:
    for tag in range(TAGS):
        pipe.hget(keys.packs(tag), MARKER)


def _delete(server: Server, fields: Iterable[tuple[str, bytes]]) -> None:
    for some in _runs(fields, _PER_PIPELINE):
        pipe = server.pipeline()
        for key, name in some:
            pipe.hdel(key, name)
        pipe.execute()


def find(
    server: Server, keys: Keys, known: Known, wanted: Iterable[tuple[bytes, int]], *, check: bool
) -> dict[tuple[bytes, int], ChunkPlace] | None:
    """Places of the `wanted` chunks; with `check` None when the generation of `known` has ended meanwhile."""
    found: dict[tuple[bytes, int], list[tuple[bytes, int]]] = {}
    for some in _runs(wanted, _PER_PIPELINE):
        pipe = server.pipeline()
        groups = list(_by_tag(keys, ((chunk, chunk) for chunk in some)))
        for names, chunks in groups:
            pipe.execute_command("EVAL", layout.FIND, len(names), *names, *map(layout.chunk_field, chunks))
        if check:
            _ask_markers(pipe, keys)
        answers = pipe.execute()
        if check and layout.generation([marker or b"" for marker in answers[-TAGS:]]) != known.generation:
            return None
        for (_, chunks), values in zip(groups, answers, strict=False):
            found |= {
                chunk: list(layout.places(value))
                for chunk, value in zip(chunks, values, strict=True)
                if value is not None
            }
    _learn(server, keys, known, {first for places in found.values() for first, _ in places})
    return {
        chunk: ChunkPlace(pack_id, block)
        for chunk, places in found.items()
        for first, block in reversed(places)
        if (pack_id := known.packs.get(first)) is not None
    }


def _learn(server: Server, keys: Keys, known: Known, seen: set[bytes]) -> None:
    """Look up packs that others have added since the load."""
    news = sorted(seen - known.packs.keys() - known.strangers)
    for some in _runs(news, _PER_PIPELINE):
        pipe = server.pipeline()
        for first in some:
            pipe.hget(keys.packs(first[0]), first)
        for first, rest in zip(some, pipe.execute(), strict=True):
            pack_id = None if rest is None else _pack_id(first, rest, known.generation)
            if pack_id is not None:
                known.packs[first] = pack_id
            else:
                known.strangers.add(first)


def add(server: Server, keys: Keys, known: Known, pack_id: str, chunks: Iterable[ChunkEntry], *, url: str) -> None:
    """Write a pack's chunks, then the pack: without the last step it does not count as known."""
    raw = bytes.fromhex(pack_id)
    first, rest = raw[:PREFIX_BYTES], raw[PREFIX_BYTES:]
    # Digests alike in 64 bits: it will not happen, but if it did a place would name the wrong pack.
    if known.packs.get(first, pack_id) != pack_id:
        raise lasting(f"index {url} knows another pack whose id begins like {pack_id}", hint="use another prefix=")
    for some in _runs(chunks, _PER_PIPELINE):
        pipe = server.pipeline()
        for names, entries in _by_tag(keys, (((entry.digest, entry.length), entry) for entry in some)):
            fields = ((layout.chunk_field((e.digest, e.length)), layout.encode_block(e.block)) for e in entries)
            pipe.execute_command("EVAL", layout.ADD, len(names), *names, first, *itertools.chain.from_iterable(fields))
        pipe.execute()
    server.client.hset(keys.packs(first[0]), first, rest + known.generation)
    known.packs[first] = pack_id
    known.strangers.discard(first)


def remove(server: Server, keys: Keys, known: Known, pack_ids: Iterable[str]) -> None:
    """Forget packs, then take their places out of all chunks; if that is interrupted, what is left is passed over."""
    firsts = sorted({bytes.fromhex(pack_id)[:PREFIX_BYTES] for pack_id in pack_ids})
    _delete(server, ((keys.packs(first[0]), first) for first in firsts))
    for first in firsts:
        known.packs.pop(first, None)
        known.strangers.add(first)
    for gone in _runs(firsts, _PACKS_PER_SWEEP):
        for tag in range(TAGS):
            pipe = server.pipeline()
            for seconds in _runs(range(256), _HASHES_PER_SWEEP):
                names = [keys.chunks(tag, second) for second in seconds]
                pipe.execute_command("EVAL", layout.SWEEP, len(names), *names, *gone)
            pipe.execute()


def _by_tag(keys: Keys, items: Iterable[tuple[tuple[bytes, int], T]]) -> Iterator[tuple[list[str], list[T]]]:
    """Items by the tag of their chunk: the names of their hashes, and themselves, in runs for one script each."""
    groups: Mapping[int, list[tuple[str, T]]] = defaultdict(list)
    for (digest, _), item in items:
        groups[digest[0]].append((keys.chunks(digest[0], digest[1]), item))
    for group in groups.values():
        for some in _runs(group, _PER_SCRIPT):
            yield [name for name, _ in some], [item for _, item in some]


def _runs(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some
