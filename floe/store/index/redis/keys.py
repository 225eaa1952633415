"""What stands in Redis under which key, in bytes. Pure.

All keys of a store begin with `PREFIX:S:`, S being 12 hex digits of its uuid's blake3, so stores can share a server.
Each key has one hash tag, and no command ever names keys of two tags:

| key              | type   | field and value                                                                    |
| ---------------- | ------ | ---------------------------------------------------------------------------------- |
| `...p{T}`        | hash   | packs: the id's first 8 bytes -> its other 24, then the 8 bytes of a generation     |
|                  |        | `g` -> the tag's marker: the store's uuid, a space, 16 random hex digits            |
|                  |        | `e` -> (in tag 00) JSON: by run id, how many keys a server had evicted             |
| `...c{T}U`       | hash   | chunks: digest bytes 2 to 31 and length (4) -> places of 11 bytes: the pack id's    |
|                  |        | first 8 bytes and the first 4 KiB block (3)                                        |
| `...r{KEY}`      | string | the bytes of the ref KEY                                                           |
| `...n{TOPIC}`    | hash   | names of notes (see Index.put_note) -> nothing; those that expired are taken out at times |
| `...n{TOPIC}NAME`| string | the milliseconds that the note lives (8), and its data; expires                      |
| `...f{00}`       | string | while a push fills a new generation from the bucket; expires                       |
| `...q{jobs}...`  |        | what indexers are asked to do, and `...l{NAME}` leases; see jobscripts.py           |

T is the first byte of the pack id or digest, U the digest's second, as two hex digits; numbers are big-endian. Chunks lie in
65,536 small hashes because Redis keeps a hash of up to 512 short fields without any overhead for each.

A place is true whatever was lost, as it names its pack by content; a counter that began anew would name a wrong one. A pack
counts as known only in the generation it was recorded in: the hash of all 256 markers. Whatever empties a tag's slot, by accident or in
replacing a server, takes its marker along and so ends the generation.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence

from floe.store.ids import digest, hexdigest

TAGS = 256
MARKER, EVICTED = b"g", b"e"
PREFIX_BYTES, GENERATION_BYTES, PLACE_BYTES = 8, 8, 11
_LENGTH = struct.Struct(">I")


class Keys:
    """The keys of the store with this uuid."""

    def __init__(self, prefix: str, store_uuid: str) -> None:
        self.store_uuid = store_uuid
        self._root = f"{prefix}:{hexdigest(store_uuid.encode())[:12]}:"

    def packs(self, tag: int) -> str:
        """The hash of packs, and the marker, of a tag (0 to 255)."""
        return f"{self._root}p{{{tag:02x}}}"

    def chunks(self, tag: int, second: int) -> str:
        """The hash of chunks whose digests begin with these two bytes."""
        return f"{self._root}c{{{tag:02x}}}{second:02x}"

    def ref(self, key: str) -> str:
        """The copy of the ref that has this key in the store."""
        return f"{self._root}r{{{key}}}"

    def notes(self, topic: str) -> str:
        """The hash of the names of a topic's notes."""
        return f"{self._root}n{{{topic}}}"

    def note(self, topic: str, name: str) -> str:
        """One note, in the slot of its topic."""
        return f"{self._root}n{{{topic}}}{name}"

    def jobs(self, part: str) -> str:
        """A part of the queue of indexers; all have one hash tag."""
        return f"{self._root}q{{jobs}}{part}"

    def lease(self, name: str) -> str:
        """Who has the lease of that name."""
        return f"{self._root}l{{{name}}}"

    @property
    def filling(self) -> str:
        """Exists while the index is filled from the bucket."""
        return f"{self._root}f{{00}}"

    def new_marker(self) -> bytes:
        """A marker that no other tag or time has."""
        return f"{self.store_uuid} {secrets.token_hex(8)}".encode()

    def owns(self, marker: bytes) -> bool:
        """Whether a marker is this store's."""
        return marker.startswith(self.store_uuid.encode() + b" ")


def generation(markers: Sequence[bytes]) -> bytes:
    """What all markers together stand for, 8 bytes."""
    return digest(b"\n".join(markers))[:GENERATION_BYTES]


def chunk_field(chunk: tuple[bytes, int]) -> bytes:
    """The field of a chunk, (digest, length in bytes), in its hash."""
    return chunk[0][2:] + _LENGTH.pack(chunk[1])


def encode_block(block: int) -> bytes:
    """A block number as the end of a place."""
    return block.to_bytes(PLACE_BYTES - PREFIX_BYTES, "big")


def places(value: bytes) -> Iterator[tuple[bytes, int]]:
    """The places in a chunk's value: the first bytes of the pack id, and the block."""
    for at in range(0, len(value) - PLACE_BYTES + 1, PLACE_BYTES):
        place = value[at : at + PLACE_BYTES]
        yield place[:PREFIX_BYTES], int.from_bytes(place[PREFIX_BYTES:], "big")


# Scripts, each of one tag's keys. Places are appended, the oldest of more than five dropped: with those a value has
# 55 bytes, and from 64 on Redis would store the whole hash in another way, five times as large.
FIND = """
local found = {}
for i = 1, #KEYS do found[i] = redis.call('HGET', KEYS[i], ARGV[i]) end
return found
"""
ADD = """
local pack = ARGV[1]
for i = 1, #KEYS do
  local field, place = ARGV[2 * i], pack .. ARGV[2 * i + 1]
  local value = redis.call('HGET', KEYS[i], field) or ''
  local kept = ''
  for at = 1, #value, 11 do
    if string.sub(value, at, at + 7) ~= pack then kept = kept .. string.sub(value, at, at + 10) end
  end
  redis.call('HSET', KEYS[i], field, string.sub(kept, -44) .. place)
end
"""
SWEEP = """
local gone = {}
for i = 1, #ARGV do gone[ARGV[i]] = true end
for i = 1, #KEYS do
  local all = redis.call('HGETALL', KEYS[i])
  for j = 1, #all, 2 do
    local value, kept = all[j + 1], ''
    for at = 1, #value, 11 do
      if not gone[string.sub(value, at, at + 7)] then kept = kept .. string.sub(value, at, at + 10) end
    end
    if kept == '' then redis.call('HDEL', KEYS[i], all[j])
    elseif kept ~= value then redis.call('HSET', KEYS[i], all[j], kept) end
  end
end
"""
