"""Tar headers to values, as raw bytes. Pure.

Sources: POSIX.1-2017 pax, GNU tar's manual ("Standard", "Extensions", "Storing Sparse Files"), and Go's archive/tar,
which is what containerd and Docker unpack layers with: where they differ from the books, this follows Go.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from floe.store.errors import DamagedError, UnsupportedError

RECORD = 512  # bytes
REG, REG_OLD, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO, CONTIGUOUS = b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"  # fmt: skip
PAX, PAX_GLOBAL, GNU_NAME, GNU_LINK, GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"
WITHOUT_DATA = (LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO)

# name, mode, uid, gid, size, mtime, checksum, type, link name, magic and version, user, group, major, minor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_CHECKSUM = slice(148, 156)
_BLANK_CHECKSUM = 8 * ord(" ")  # the field counts as spaces in the sum
_STAR_TRAILER = b"tar\0"
_STAR_PREFIX = 131  # bytes; times follow
_GNU_MAP, _GNU_MAP_ITEMS, _GNU_EXTENDED, _GNU_SIZE = 386, 4, 482, slice(483, 495)
_GNU_TIMES = slice(345, 357), slice(357, 369)
_EXTENSION_ITEMS, _EXTENSION_EXTENDED = 21, 504
_XATTR = b"SCHILY.xattr."
_NS_DIGITS = 9
_NUMBER_MAX = 1 << 62

PLACES_MAX = 1 << 20  # data areas of a sparse file; 16 bytes of memory each


class SparseMap:
    """Where the data of a sparse file lies: (offset, length) places, in bytes. DamagedError beyond PLACES_MAX."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._numbers = array("q")  # offset, length, offset, length, ...

    def append(self, number: int) -> None:
        """The next offset or length."""
        if len(self._numbers) >= 2 * PLACES_MAX:
            raise DamagedError(f"{self._what} has a sparse file of more than {PLACES_MAX} pieces, or without an end")
        self._numbers.append(number)

    def extend(self, numbers: Iterable[int]) -> None:
        """More of them."""
        for number in numbers:
            self.append(number)

    def __len__(self) -> int:
        return len(self._numbers) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> tuple[int, int]:
        return self._numbers[2 * number], self._numbers[2 * number + 1]

    @property
    def is_whole(self) -> bool:
        """Whether every offset has its length."""
        return len(self._numbers) % 2 == 0


@dataclass(slots=True)
class Entry:
    """One archive member. Sizes in bytes; `mtime` in whole seconds, `mtime_ns` the nanoseconds after.

    `size` is the file's size and `stored` what follows in the archive (less, for a sparse file, whose data lies at the
    (offset, length) places in `sparse`).
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes
    major: int = 0
    minor: int = 0
    mtime_ns: int = 0
    stored: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: SparseMap | None = None
    gnu_extended: bool = False


def parse_header(header: bytes, what: str) -> Entry:
    """A 512-byte header that is not all zeros; DamagedError names `what` when it is none."""
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, _, major, minor, prefix) = _HEADER.unpack(
        header
    )
    expected = _number(checksum, what)
    # Most of a header is zeros, which are faster taken out than added.
    total = sum(header.translate(None, b"\0")) - sum(checksum) + _BLANK_CHECKSUM
    if total != expected and _signed_sum(header) != expected:
        raise DamagedError(f"{what} is not a valid tar: a header does not match its checksum")
    entry = Entry(
        _text(name), kind, _number(mode, what) & 0o7777, _number(uid, what), _number(gid, what),
        _number(size, what), _number(mtime, what), _text(link),
    )  # fmt: skip
    posix, gnu = magic[:6] == b"ustar\0", magic == b"ustar  \0"
    if posix or gnu:
        entry.major, entry.minor = _number(major, what), _number(minor, what)
    if posix:
        star = header[508:] == _STAR_TRAILER
        before = _text(prefix[:_STAR_PREFIX] if star else prefix)
        if before:
            entry.name = before + b"/" + entry.name
    if gnu and any(header[place.start] and not _is_number(header[place]) for place in _GNU_TIMES):
        # Go before 1.8 put the first part of a long path there; which of the two it is, other readers guess.
        raise UnsupportedError(f"{what} has a header of an old Go, GNU's with a prefix")
    if entry.size < 0:
        raise DamagedError(f"{what} has an entry of negative size")
    entry.stored = 0 if kind in WITHOUT_DATA else entry.size
    if kind == GNU_SPARSE:
        entry.size = _number(header[_GNU_SIZE], what)
        entry.sparse = SparseMap(what)
        entry.sparse.extend(_gnu_numbers(header, _GNU_MAP, _GNU_MAP_ITEMS, what))
        entry.gnu_extended = header[_GNU_EXTENDED] != 0
    return entry


def _signed_sum(header: bytes) -> int:
    """The sum as some old archivers made it, of signed bytes."""
    blank = header[: _CHECKSUM.start] + b" " * 8 + header[_CHECKSUM.stop :]
    return sum(b - 256 if b > 127 else b for b in blank)


def parse_gnu_extension(places: SparseMap, block: bytes, what: str) -> bool:
    """Add the places of a block that continues a GNU sparse map; whether another follows."""
    places.extend(_gnu_numbers(block, 0, _EXTENSION_ITEMS, what))
    return block[_EXTENSION_EXTENDED] != 0


def parse_pax(data: bytes, what: str) -> list[tuple[bytes, bytes]]:
    """The records of a pax header, `length key=value` and a newline each, in order."""
    records = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        digits = data[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise DamagedError(f"{what} has a malformed pax header")
        end = position + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not (space < end <= len(data)) or not equals or not key or data[end - 1 : end] != b"\n":
            raise DamagedError(f"{what} has a malformed pax header")
        records.append((key, value))
        position = end
    return records


def apply_pax(entry: Entry, records: list[tuple[bytes, bytes]], what: str) -> bool:
    """Let pax records change `entry`. True: the entry's data begins with a sparse map (GNU sparse format 1.0)."""
    sparse: dict[bytes, bytes] = {}
    places = SparseMap(what)
    for key, value in records:
        if key.startswith(b"GNU.sparse."):
            sparse[key[11:]] = value
            if key[11:] in (b"offset", b"numbytes"):
                places.append(_decimal(value, what))
        elif key.startswith(_XATTR):
            entry.xattrs[key[len(_XATTR) :]] = value
        elif value:  # an empty value leaves what the header says
            _apply(entry, key, value, what)
    if b"map" in sparse and not places:
        places.extend(_decimal(number, what) for number in _fields(sparse[b"map"]))
    return _apply_sparse(entry, sparse, places, what) if sparse else False


def _apply(entry: Entry, key: bytes, value: bytes, what: str) -> None:
    if key in (b"path", b"linkpath") and b"\0" in value:
        raise DamagedError(f"{what} has an entry with a NUL byte in its {key.decode()}")
    if key == b"path":
        entry.name = value
    elif key == b"linkpath":
        entry.link = value
    elif key == b"uid":
        entry.uid = _decimal(value, what)
    elif key == b"gid":
        entry.gid = _decimal(value, what)
    elif key == b"size":
        entry.size = _decimal(value, what)
        entry.stored = 0 if entry.type in WITHOUT_DATA else entry.size
    elif key == b"mtime":
        entry.mtime, entry.mtime_ns = _time(value, what)


def _apply_sparse(entry: Entry, sparse: dict[bytes, bytes], places: SparseMap, what: str) -> bool:
    version = (sparse.get(b"major"), sparse.get(b"minor"))
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1"), (b"1", b"0")):
        raise UnsupportedError(f"{what} has a sparse file of the unknown GNU format {version!r}")
    if version == (None, None) and not places and b"numblocks" not in sparse:
        return False
    size = sparse.get(b"realsize") or sparse.get(b"size")
    if size is None:
        raise DamagedError(f"{what} has a sparse file without a size")
    entry.size = _decimal(size, what)
    entry.name = sparse.get(b"name") or entry.name
    if version == (b"1", b"0"):
        return True
    if not places.is_whole:
        raise DamagedError(f"{what} has a sparse file with half a place in its map")
    entry.sparse = places
    return False


def parse_count(data: bytes, what: str) -> int:
    """How many places a GNU 1.0 sparse map says it has; DamagedError for more than PLACES_MAX."""
    count = _decimal(data, what)
    if count > PLACES_MAX:
        raise DamagedError(f"{what} has a sparse file of {count} pieces; at most {PLACES_MAX} are read")
    return count


def parse_sparse_number(data: bytes, what: str) -> int:
    """A line of a GNU 1.0 sparse map."""
    return _decimal(data, what)


def check_sparse(entry: Entry, what: str) -> None:
    """DamagedError unless the places of a sparse file ascend, lie inside of it, and add up to its stored bytes."""
    end = total = 0
    for offset, length in () if entry.sparse is None else entry.sparse:
        if offset < end or length < 0 or offset + length > entry.size:
            raise DamagedError(f"{what} has a sparse file whose map does not fit its size")
        end = offset + length
        total += length
    if total != entry.stored:
        raise DamagedError(f"{what} has a sparse file whose map does not fit its data")


def _fields(data: bytes) -> Iterator[bytes]:
    """What stands between commas, one at a time: a list of all would take some hundred times the memory."""
    start = 0
    while start < len(data):
        end = data.find(b",", start)
        end = len(data) if end < 0 else end
        yield data[start:end]
        start = end + 1


def _gnu_numbers(block: bytes, start: int, items: int, what: str) -> Iterator[int]:
    for at in range(start, start + 24 * items, 24):
        if block[at] == 0:  # an unused item
            break
        yield _number(block[at : at + 12], what)
        yield _number(block[at + 12 : at + 24], what)


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


@functools.lru_cache(4096)  # owners, modes and times are the same in most headers
def _number(data: bytes, what: str) -> int:
    """Octal digits, or base 256 (two's complement below a set top bit)."""
    if data[0] & 0x80:
        top = 8 * len(data) - 1
        value = int.from_bytes(data, "big") & (1 << top) - 1
        value -= (value >> (top - 1)) << top
    else:
        digits = data.strip(b" \0").partition(b"\0")[0]
        if not digits:
            return 0
        if digits.strip(b"01234567"):
            raise DamagedError(f"{what} is not a valid tar: a header has {_quoted(digits)} for a number")
        value = int(digits, 8)
    if abs(value) > _NUMBER_MAX:
        raise DamagedError(f"{what} has a header with a number out of range")
    return value


def _is_number(data: bytes) -> bool:
    try:
        _number(data, "")
    except DamagedError:
        return False
    return True


def _decimal(data: bytes, what: str) -> int:
    if not data.isdigit() or len(data) > 19 or int(data) > _NUMBER_MAX:
        raise DamagedError(f"{what} is not a valid tar: it has {_quoted(data)} for a number")
    return int(data)


def _time(data: bytes, what: str) -> tuple[int, int]:
    """Seconds with a fraction, maybe negative; digits past nanoseconds are cut off, as Go does."""
    whole, _, fraction = data.partition(b".")
    digits = whole[1:] if whole[:1] == b"-" else whole
    if not digits.isdigit() or len(digits) > 18 or (fraction and not fraction.isdigit()):
        raise DamagedError(f"{what} is not a valid tar: it has {_quoted(data)} for a time")
    seconds = int(digits)
    nanoseconds = int(fraction[:_NS_DIGITS].ljust(_NS_DIGITS, b"0"))
    total = seconds * 10**9 + nanoseconds
    return divmod(-total if whole[:1] == b"-" else total, 10**9)


def _quoted(data: bytes) -> str:
    """Bytes of a header for a message, in quotes."""
    return repr(data[:32].decode(errors="backslashreplace"))
