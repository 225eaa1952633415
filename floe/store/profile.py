"""Start-up profiles: what of a tree its users read first, as bytes and back, merged and put in order. Pure.

A profile knows what was touched twice over: as frames of the tree's packs, to be replayed as they are, and as pieces of
files by path, to be found in another tree. The byte table is in docs/FORMAT.md.

`merge` does not depend on the order of its two operands, so nodes that finish together may add their recordings one
after the other, whoever comes first. It forgets: counts are halved now and then, and what is touched no more fades.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

import zstandard

from floe.store.errors import DamagedError, TransitDamageError, UnsupportedError
from floe.store.frames import decode_frame
from floe.store.ids import Buffer, digest
from floe.store.packindex import CODEC_ZSTD, FrameEntry

VERSION = 1
PIECE = 128 << 10  # bytes; the grid on which a file's bytes are told apart: a frame of image layers
FRAMES_MAX, PIECES_MAX = 8192, 8192  # remembered; what most starts touch stays
PATHS_MAX = 1 << 20  # bytes of all paths
STARTS_MAX = 16  # recordings after which counts are halved, so that the past weighs no more than the present
PATH_MAX = 4095  # bytes; Linux's PATH_MAX without the zero
_SHARE = 4  # what less than one start in so many touched is not replayed
_COUNT_MAX = 0xFFFF  # what the format holds; reached by strange profiles only
_BODY_MAX = 4 << 20  # bytes; refuses an absurd size before memory is asked for

_MAGIC = b"FLOEPROF"
# magic, version, flags, body bytes, starts, frames, files, zero, digest of the body
_HEADER = struct.Struct("<8sHHIIIII32s")
_LENGTH = struct.Struct("<H")
# pack's number in the device table, starts, first touch in ms, frame
_FRAME = struct.Struct("<HHII")
_COUNT = struct.Struct("<I")
# piece, first touch in ms, starts, zero
_PIECE = struct.Struct("<IIHxx")
HEADER_BYTES, FRAME_BYTES, PIECE_BYTES = _HEADER.size, _FRAME.size, _PIECE.size
_REPAIR = "it is replaced by the next recording; `--clear` of `floe model profile` or `floe image profile` removes it"

Frame: TypeAlias = "tuple[int, int]"
"""A pack's number in the tree's device table, from 0, and a frame's in that pack."""
Piece: TypeAlias = "tuple[bytes, int]"
"""A path relative to the root, and the number of a piece of PIECE bytes of that file."""
K = TypeVar("K", bound=Hashable)


class Touch(NamedTuple):
    """When something was read for the first time, in ms since the tree's first read, and in how many `starts`."""

    first: int
    starts: int


@dataclass(frozen=True)
class Profile:
    """What was touched in `starts` recordings. `source` names whose versions have paths in common (see profiles.py).

    `prefix`: the path below which this tree has what the source's other trees have at their root, with a slash at its
    end, or empty. A profile of a source, as opposed to a tree, has no frames.
    """

    starts: int = 0
    source: str = ""
    prefix: bytes = b""
    frames: Mapping[Frame, Touch] = field(default_factory=dict)
    pieces: Mapping[Piece, Touch] = field(default_factory=dict)

    def hot_frames(self) -> list[Frame]:
        """The frames worth replaying, in the order of need."""
        return _hot(self.frames, self.starts)

    def hot_pieces(self) -> list[Piece]:
        """The pieces of files worth replaying, in the order of need."""
        return _hot(self.pieces, self.starts)

    def encode(self) -> bytes:
        """The object's bytes."""
        source = self.source.encode()
        parts = [_LENGTH.pack(len(source)), source, _LENGTH.pack(len(self.prefix)), self.prefix]
        for (pack, frame), touch in sorted(self.frames.items(), key=lambda item: (item[1].first, item[0])):
            parts.append(_FRAME.pack(pack, touch.starts, touch.first, frame))
        files: dict[bytes, list[tuple[int, Touch]]] = {}
        for (path, piece), touch in sorted(self.pieces.items()):
            files.setdefault(path, []).append((piece, touch))
        for path, pieces in files.items():
            parts += [_LENGTH.pack(len(path)), path, _COUNT.pack(len(pieces))]
            parts += [_PIECE.pack(piece, touch.first, touch.starts) for piece, touch in pieces]
        body = b"".join(parts)
        header = _HEADER.pack(
            _MAGIC, VERSION, 0, len(body), self.starts, len(self.frames), len(files), 0, digest(body)
        )  # fmt: skip
        return header + zstandard.ZstdCompressor(level=3).compress(body)

    @classmethod
    def decode(cls, data: Buffer, key: str) -> Profile:
        """Parse the object found at `key`; DamagedError or UnsupportedError names that key."""
        if len(data) < _HEADER.size:
            raise DamagedError(f"{key} is no profile: {len(data)} bytes", hint=_REPAIR)
        magic, version, flags, size, starts, frames, files, _, expected = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise DamagedError(f"{key} is no profile", hint=_REPAIR)
        if version != VERSION or flags:
            raise UnsupportedError(
                f"{key} has format version {version}, flags {flags:#x}; this Floe reads version {VERSION}",
                hint="upgrade Floe on this node",
            )
        packed = memoryview(data)[_HEADER.size :]
        damaged = DamagedError(f"{key} does not match its digest", hint=_REPAIR)
        if size > _BODY_MAX or frames > FRAMES_MAX:
            raise damaged
        try:
            verified = decode_frame(packed, FrameEntry(len(packed), CODEC_ZSTD, expected), size)
        except TransitDamageError as error:
            raise damaged from error
        try:
            return _parse(bytes(verified.content), starts, frames, files)
        except (struct.error, ValueError) as error:
            raise DamagedError(f"{key} cannot be parsed: {error}", hint=_REPAIR) from error


def merge(one: Profile, other: Profile) -> Profile:
    """Both together, within the limits."""
    starts = one.starts + other.starts
    halve = starts > STARTS_MAX
    source, prefix = max((one.source, one.prefix), (other.source, other.prefix))
    return Profile(
        starts=starts // 2 if halve else starts,
        source=source,
        prefix=prefix,
        frames=_best(_together(one.frames, other.frames, halve=halve), FRAMES_MAX),
        pieces=_within_paths(_best(_together(one.pieces, other.pieces, halve=halve), PIECES_MAX)),
    )


def is_news(known: Profile, recorded: Profile) -> bool:
    """Whether `recorded` would change what `known` says: else a fleet need not write it down once more.

    The first recordings always count; later ones where more than a tenth of what either has, only one of them has.
    """
    if known.starts < 3:
        return True
    for have, new in ((known.hot_frames(), recorded.frames), (known.hot_pieces(), recorded.pieces)):
        ours, theirs = set[Hashable](have), set[Hashable](new)
        if len(ours ^ theirs) * 10 > len(ours | theirs):
            return True
    return False


def _together(one: Mapping[K, Touch], other: Mapping[K, Touch], *, halve: bool) -> dict[K, Touch]:
    found = dict(one)
    for key, touch in other.items():
        known = found.get(key)
        if known is None:
            found[key] = touch
        else:
            found[key] = Touch(min(known.first, touch.first), min(known.starts + touch.starts, _COUNT_MAX))
    if halve:
        found = {key: Touch(first, starts // 2) for key, (first, starts) in found.items() if starts > 1}
    return found


def _best(touches: Mapping[K, Touch], most: int) -> dict[K, Touch]:
    """Those of most starts, of these the earliest."""
    if len(touches) <= most:
        return dict(touches)
    ranked = sorted(touches.items(), key=lambda item: (-item[1].starts, item[1].first, item[0]))
    return dict(ranked[:most])


def _within_paths(pieces: dict[Piece, Touch]) -> dict[Piece, Touch]:
    if sum(len(path) for path in {path for path, _ in pieces}) <= PATHS_MAX:
        return pieces
    kept: dict[Piece, Touch] = {}
    paths: set[bytes] = set()
    size = 0
    for key, touch in sorted(pieces.items(), key=lambda item: (-item[1].starts, item[1].first, item[0])):
        if key[0] not in paths:
            if size + len(key[0]) > PATHS_MAX:
                break
            size += len(key[0])
            paths.add(key[0])
        kept[key] = touch
    return kept


def _hot(touches: Mapping[K, Touch], starts: int) -> list[K]:
    hot = [(touch.first, key) for key, touch in touches.items() if touch.starts * _SHARE >= starts]
    return [key for _, key in sorted(hot)]


def _parse(body: bytes, starts: int, frames: int, files: int) -> Profile:
    source, at = _text(body, 0)
    prefix, at = _text(body, at)
    touched: dict[Frame, Touch] = {}
    for _ in range(frames):
        pack, count, first, frame = _FRAME.unpack_from(body, at)
        touched[pack, frame] = Touch(first, count)
        at += _FRAME.size
    pieces: dict[Piece, Touch] = {}
    for _ in range(files):
        path, at = _text(body, at)
        if len(path) > PATH_MAX:
            raise ValueError(f"a path has {len(path)} bytes")
        (number,) = _COUNT.unpack_from(body, at)
        at += _COUNT.size
        for _ in range(number):
            piece, first, count = _PIECE.unpack_from(body, at)
            pieces[path, piece] = Touch(first, count)
            at += _PIECE.size
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes too many")
    return Profile(starts, source.decode(), prefix, touched, pieces)


def _text(body: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _LENGTH.unpack_from(body, at)
    at += _LENGTH.size
    if at + length > len(body):
        raise ValueError("a text reaches past the end")
    return body[at : at + length], at + length
