"""Content to pieces by the chunk rule: a file up to 4 MiB whole, a larger one on its own 4 MiB grid.

A piece of zeros is a hole. In a sparse file holes are found with SEEK_DATA, without reading them.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    FloeError,
    SourceChangedError,
    UnavailableError,
)
from floe.store.nodes import chunk_bits

MAX_FILE = 16 << 40  # bytes; four million chunks, ext4's limit too
Identity: TypeAlias = bytes  # a tuple would take four times the memory, for each of perhaps a million files
INODE_BYTES = 16  # of an identity: the file, whatever its content
_IDENTITY = struct.Struct("<QQIQqq")
_PROBE = 64  # bytes: nearly all data shows within these that it is not zeros


class Readable(Protocol):
    """What a piece is read from: as io.RawIOBase, fewer bytes than asked for are allowed, none means the end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes."""
        ...


def is_zeros(data: bytes) -> bool:
    """Whether all bytes are zero."""
    return not any(data[:_PROBE]) and data == bytes(len(data))


def piece_lengths(size: int) -> Iterator[int]:
    """Bytes of each piece of a file of `size` bytes."""
    grid = 1 << chunk_bits(size)
    left = size
    while left > grid:
        yield grid
        left -= grid
    if left:
        yield left


def stream_pieces(readable: Readable, size: int, short: Callable[[int], FloeError]) -> Iterator[bytes | None]:
    """The pieces of the next `size` bytes of a stream; None for a hole. Raises `short(bytes missing)` at its early end."""
    left = size
    for length in piece_lengths(size):
        data = read_exactly(readable, length)
        left -= len(data)
        if len(data) < length:
            raise short(left)
        yield None if is_zeros(data) else data


def read_exactly(readable: Readable, length: int) -> bytes:
    """`length` bytes; fewer only at the end."""
    data = readable.read(length)
    if len(data) == length or not data:
        return data
    parts, got = [data], len(data)
    while got < length and (data := readable.read(length - got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def identity(found: os.stat_result) -> Identity:
    """What tells whether a file is still the same, with the same content: a write changes at least its ctime."""
    return _IDENTITY.pack(
        found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def changed(path: bytes) -> SourceChangedError:
    """The error for a file that is not what it was when reading began."""
    return SourceChangedError(
        f"{shown(path)} changed or vanished while it was read; nothing was published",
        hint="let its writer finish, then try again",
    )


def shown(path: bytes) -> str:
    """A raw path as people can read it."""
    return path.decode("utf-8", "backslashreplace")


def os_failure(error: OSError, path: bytes) -> FloeError:
    """What reading `path` failing with `error` means to the user."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(
            f"{shown(path)} cannot be read: {error.strerror}", hint="run as a user who may read it"
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP):
        return changed(path)
    return UnavailableError(f"{shown(path)} cannot be read: {error.strerror}")


def open_file(path: bytes) -> int:
    """A descriptor for reading, of a regular file that is no symlink; never waits for a fifo's writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise os_failure(error, path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise changed(path)
    return descriptor


def file_pieces(descriptor: int, size: int, path: bytes) -> Iterator[bytes | None]:
    """The pieces of an open file. SourceChangedError when it turns out shorter or longer than `size`."""
    offset, data_at = 0, 0
    for length in piece_lengths(size):
        if offset + length > data_at:
            data_at = _next_data(descriptor, max(offset, data_at), size)
        if data_at >= offset + length:
            yield None
        else:
            data = _pread_exactly(descriptor, length, offset, path)
            yield None if is_zeros(data) else data
            data_at = min(data_at, offset + length)
        offset += length
    try:
        if os.pread(descriptor, 1, size):
            raise changed(path)
    except OSError as error:
        raise os_failure(error, path) from error


def _next_data(descriptor: int, offset: int, size: int) -> int:
    """Where data is found next from `offset` on; `size` when only a hole follows."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: no data from here to the end. Anything else: this file system does not tell, so all is data.
        return size if error.errno == errno.ENXIO else offset


def _pread_exactly(descriptor: int, length: int, offset: int, path: bytes) -> bytes:
    parts: list[bytes] = []
    got = 0
    while got < length:
        try:
            data = os.pread(descriptor, length - got, offset + got)
        except OSError as error:
            raise os_failure(error, path) from error
        if not data:
            raise changed(path)
        parts.append(data)
        got += len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_size(size: int, what: str) -> None:
    """BadInputError for a file larger than 16 TiB."""
    if size > MAX_FILE:
        raise BadInputError(f"{what} has {size} bytes; Floe stores files of up to {MAX_FILE >> 40} TiB")
