"""A tar archive read once, front to back: entries, and the content of each while it passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from floe.ingest.oci import tarheader
from floe.ingest.oci.tarheader import RECORD, Entry, SparseMap
from floe.store.errors import DamagedError

_SPECIAL_MAX = 4 << 20  # bytes of a pax header or a long name
_NUMBER_MAX = 20  # digits of a number in a sparse map, and more
_ZERO_RECORD = bytes(RECORD)
_ZEROS = bytes(1 << 20)


class Content(Protocol):
    """Bytes of one regular file, in order."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; b"" at the end."""
        ...


class Feed:
    """Pieces of bytes as one stream, with no more than a piece in memory."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._at = 0
        self._before = 0  # bytes of earlier pieces

    @property
    def position(self) -> int:
        """How many bytes were taken."""
        return self._before + self._at

    def some(self, limit: int) -> bytes:
        """Between 1 and `limit` bytes, whatever is at hand; b"" at the end."""
        while self._at >= len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._before += len(self._piece)
            self._piece, self._at = piece, 0
        at = self._at
        taken = self._piece[at : at + limit]
        self._at = at + len(taken)
        return taken

    def take(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end."""
        end = self._at + size
        if end <= len(self._piece):  # nearly always
            data = self._piece[self._at : end]
            self._at = end
            return data
        data = self.some(size)
        if len(data) == size or not data:
            return data
        parts = [data]
        missing = size - len(data)
        while missing and (data := self.some(missing)):
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        if self._at + size <= len(self._piece):
            self._at += size
            return size
        left = size
        while left and (data := self.some(min(left, len(_ZEROS)))):
            left -= len(data)
        return size - left

    def drain(self) -> None:
        """Read to the end, so that digests over the stream are whole."""
        while self.some(len(_ZEROS)):
            pass


class _Data:
    """The stored bytes of the current entry."""

    def __init__(self, feed: Feed, size: int, what: str) -> None:
        self._feed, self.left, self._what = feed, size, what

    def read(self, size: int = -1, /) -> bytes:
        wanted = self.left if size < 0 else min(size, self.left)
        if not wanted:
            return b""
        data = self._feed.some(wanted) if size >= 0 else self._feed.take(wanted)
        if not data or (size < 0 and len(data) < wanted):
            raise DamagedError(f"{self._what} is cut short: {self.left} bytes of a file are missing")
        self.left -= len(data)
        return data


class Limited:
    """The next `size` bytes of `content`, of which there are at least as many."""

    def __init__(self, content: Content, size: int) -> None:
        self._content, self._left = content, size

    def read(self, size: int = -1, /) -> bytes:
        """See Content.read."""
        data = self._content.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


class Sparse:
    """A sparse file's bytes, its holes as zeros. `skip` passes over bytes known to lie in a hole, for nothing."""

    def __init__(self, data: Content, entry: Entry) -> None:
        self._data = data
        self._size = entry.size
        self._at = 0
        self._places = iter(() if entry.sparse is None else entry.sparse)
        self._place = self._next_place()

    def _next_place(self) -> tuple[int, int] | None:
        """The next data area that is not empty: its offset and length in bytes."""
        return next((place for place in self._places if place[1]), None)

    def hole(self) -> int:
        """Bytes from here on that are hole, 0 inside of data."""
        if self._place is None:
            return self._size - self._at
        return max(0, self._place[0] - self._at)

    def skip(self, size: int) -> None:
        """Pass over `size` bytes, no more than `hole()`."""
        self._at += size

    def read(self, size: int = -1, /) -> bytes:
        """See Content.read."""
        if size < 0:
            return b"".join(iter(lambda: self.read(len(_ZEROS)), b""))
        hole = self.hole()
        if hole:
            data = _ZEROS[: min(hole, size)]
        elif self._place is None:
            return b""
        else:
            end = sum(self._place)
            data = self._data.read(min(size, end - self._at))
            if self._at + len(data) == end:
                self._place = self._next_place()
        self._at += len(data)
        return data


class TarStream:
    """Iterates over the entries of an archive; `content()` is the current entry's, until the next is asked for.

    DamagedError: no tar archive, or cut short; UnsupportedError: a sparse format of the future. `what` names the
    archive in messages.
    """

    def __init__(self, pieces: Iterator[bytes], what: str) -> None:
        self._feed = Feed(pieces)
        self._what = what
        self._data = _Data(self._feed, 0, what)
        self._padding = 0
        self._entry: Entry | None = None
        self.start = 0
        """Where the current entry begins, its extended headers included; at the end, where the entries end. In bytes."""

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            self._entry = entry
            yield entry
        self._feed.drain()

    def content(self) -> _Data | Sparse:
        """The current entry's bytes, `entry.size` of them."""
        assert self._entry is not None
        return self._data if self._entry.sparse is None else Sparse(self._data, self._entry)

    def _next(self) -> Entry | None:
        name = link = b""
        records: list[tuple[bytes, bytes]] = []
        self._finish()
        self.start = self._feed.position
        while True:
            self._finish()
            header = self._header()
            if header is None:
                if name or link or records:
                    raise DamagedError(f"{self._what} ends behind an extended header")
                return None
            entry = tarheader.parse_header(header, self._what)
            if entry.type in (tarheader.PAX, tarheader.GNU_NAME, tarheader.GNU_LINK):
                data = self._special(entry)
                if entry.type == tarheader.PAX:
                    records = tarheader.parse_pax(data, self._what)
                elif entry.type == tarheader.GNU_NAME:
                    name = data.partition(b"\0")[0]
                else:
                    link = data.partition(b"\0")[0]
                continue
            if entry.type == tarheader.PAX_GLOBAL:  # containerd ignores these
                self._start(entry.stored)
                continue
            return self._complete(entry, name, link, records)

    def _complete(self, entry: Entry, name: bytes, link: bytes, records: list[tuple[bytes, bytes]]) -> Entry:
        map_in_data = tarheader.apply_pax(entry, records, self._what) if records else False
        entry.name, entry.link = name or entry.name, link or entry.link
        if entry.type in (tarheader.REG_OLD, tarheader.CONTIGUOUS):
            old_directory = entry.type == tarheader.REG_OLD and entry.name.endswith(b"/")
            entry.type = tarheader.DIRECTORY if old_directory else tarheader.REG
            entry.stored = 0 if old_directory else entry.stored
        if entry.gnu_extended and entry.sparse is not None:
            self._extended(entry.sparse)
        if entry.type == tarheader.GNU_SPARSE:
            entry.type = tarheader.REG
        self._start(entry.stored)
        if map_in_data:
            entry.sparse = self._map(entry)
        if entry.sparse is not None:
            tarheader.check_sparse(entry, self._what)
        return entry

    def _start(self, stored: int) -> None:
        self._data = _Data(self._feed, stored, self._what)
        self._padding = -stored % RECORD

    def _finish(self) -> None:
        left = self._data.left + self._padding
        # An archive may end without the padding of its last file.
        if left and self._feed.skip(left) < self._data.left:
            raise DamagedError(f"{self._what} is cut short: {self._data.left} bytes of a file are missing")
        self._data.left = self._padding = 0

    def _header(self) -> bytes | None:
        """The next header; None at the end: two records of zeros, or no more bytes."""
        header = self._feed.take(RECORD)
        if header == _ZERO_RECORD:
            header = self._feed.take(RECORD)
            if header and header != _ZERO_RECORD:
                raise DamagedError(f"{self._what} goes on behind a record of zeros")
            return None
        if not header:
            return None
        if len(header) < RECORD:
            raise DamagedError(f"{self._what} is cut short inside of a header")
        return header

    def _block(self) -> bytes:
        block = self._feed.take(RECORD)
        if len(block) < RECORD:
            raise DamagedError(f"{self._what} is cut short inside of a header")
        return block

    def _extended(self, places: SparseMap) -> None:
        while tarheader.parse_gnu_extension(places, self._block(), self._what):
            pass

    def _special(self, entry: Entry) -> bytes:
        if entry.stored > _SPECIAL_MAX:
            raise DamagedError(f"{self._what} has an extended header of {entry.stored} bytes")
        self._start(entry.stored)
        return self._data.read()

    def _map(self, entry: Entry) -> SparseMap:
        """GNU sparse format 1.0: decimal numbers on lines, the first their count of pairs, padded to records."""
        places = SparseMap(self._what)
        wanted: int | None = None
        rest = b""
        while wanted is None or len(places) < wanted:
            if self._data.left < RECORD:
                raise DamagedError(f"{self._what} has a sparse file without an end of its map")
            part = rest
            while len(part) < len(rest) + RECORD:
                part += self._data.read(len(rest) + RECORD - len(part))
            *lines, rest = part.split(b"\n")
            for line in lines:
                if wanted is None:
                    wanted = tarheader.parse_count(line, self._what)
                elif len(places) < wanted:
                    places.append(tarheader.parse_sparse_number(line, self._what))
            if len(rest) > _NUMBER_MAX and (wanted is None or len(places) < wanted):  # else it is padding
                raise DamagedError(f"{self._what} has a sparse file with a malformed map")
        entry.stored = self._data.left
        return places
