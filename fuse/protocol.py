"""The kernel's FUSE protocol, as far as a flat read-only directory of packs needs it: pure bytes and values.

Source: include/uapi/linux/fuse.h, protocol 7.31 and later. All integers little-endian here, since every
machine that Floe runs on is; one request is read at a time, and each reply is one write.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, INIT = 1, 2, 3, 14, 15, 17, 18, 26
OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 34, 36, 38, 42

ROOT_NODE = 1
MAX_READ = 1 << 20  # bytes in one READ: the mount option max_read and MAX_PAGES say the same
MAX_WRITE = 4096  # bytes; nothing is ever written, but the kernel wants a read buffer that could hold it

# opcode, unique, node id after the length; then uid, gid, pid and padding
IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")  # length, negative errno, unique
IN_BYTES, OUT_BYTES = IN_HEADER.size, OUT_HEADER.size
READ_IN = struct.Struct("<QQIIQII")  # fh, offset, size, read flags, lock owner, flags, padding
_INIT_IN = struct.Struct("<4I")  # major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("<4I2HII2HII24x")
_UNIQUE = struct.Struct("<Q")
_ATTR = struct.Struct("<6Q10I")
_ENTRY_OUT = struct.Struct("<4Q2I")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QIi")
_STATFS_OUT = struct.Struct("<5Q4I24x")
_DIRENT = struct.Struct("<QQII")

MAJOR, MINOR = 7, 40  # the newest minor whose replies we know; the kernel adapts to a lower one
ASYNC_READ, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES, INIT_EXT = 1 << 0, 1 << 15, 1 << 18, 1 << 22, 1 << 30
# ASYNC_DIO lets EROFS's direct reads be asynchronous: a reader killed while the store is silent dies at once.
WANTED = ASYNC_READ | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT
PAGES = MAX_READ // 4096
# Every stalled read holds one place; beyond the congestion threshold the kernel holds all others back.
MAX_BACKGROUND = 4096
CONGESTION_THRESHOLD = MAX_BACKGROUND * 3 // 4

FOPEN_DIRECT_IO = 1 << 0  # no second page cache below EROFS's
# No FLUSH on close: it cannot be killed, and without a worker every fork of an opener would wait for it.
FOPEN_NOFLUSH = 1 << 5
INTERRUPT_BIT = 1 << 0  # in `unique`: the request is an INTERRUPT, its target has the bit clear
VALID = 7 * 24 * 3600  # seconds that names and attributes may be cached: packs never change

_DIR_MODE = stat.S_IFDIR | 0o500  # packs hold what a tree may hide from others
_FILE_MODE = stat.S_IFREG | 0o400
_DT_DIR, _DT_REG = 4, 8


def node_id(pack_id: str) -> int:
    """The node id of a pack: the first 8 bytes of its id, so that every worker computes the same."""
    return int(pack_id[:16], 16)


def header(length: int, unique: int, error: int = 0) -> bytes:
    """A reply's header; `length` is that of what follows it, `error` a positive errno."""
    return OUT_HEADER.pack(OUT_BYTES + length, -error, unique)


def decode_init(body: memoryview) -> tuple[int, int, int, int]:
    """(major, minor, max_readahead, flags) of an INIT request."""
    major, minor, readahead, flags = _INIT_IN.unpack_from(body)
    return major, minor, readahead, flags


def init_reply(minor: int, flags: int) -> bytes:
    """The answer to INIT: of what the kernel offers, what we want."""
    granted = WANTED & flags
    return _INIT_OUT.pack(
        MAJOR, min(minor, MINOR), MAX_READ, granted, MAX_BACKGROUND, CONGESTION_THRESHOLD, MAX_WRITE, 1, PAGES, 0, 0, 0
    )


def version_reply() -> bytes:
    """The answer to an INIT with a newer major: the kernel then asks again with ours."""
    return _INIT_OUT.pack(MAJOR, MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def interrupted(body: memoryview) -> int:
    """The unique of the request that an INTERRUPT is about."""
    (unique,) = _UNIQUE.unpack_from(body)
    return int(unique)


def name(body: memoryview) -> bytes:
    """The name in a LOOKUP, without its terminating zero."""
    return bytes(body).split(b"\0", 1)[0]


def _attr(node: int, size: int) -> bytes:
    if node == ROOT_NODE:
        return _ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, _DIR_MODE, 2, 0, 0, 0, 4096, 0)
    return _ATTR.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, _FILE_MODE, 1, 0, 0, 0, 4096, 0)


def entry_reply(node: int, size: int) -> bytes:
    """LOOKUP's answer for a pack of `size` bytes."""
    return _ENTRY_OUT.pack(node, 0, VALID, VALID, 0, 0) + _attr(node, size)


def attr_reply(node: int, size: int) -> bytes:
    """GETATTR's answer; the root's size is 0."""
    return _ATTR_OUT.pack(VALID, 0, 0) + _attr(node, size)


def open_reply(flags: int = FOPEN_DIRECT_IO | FOPEN_NOFLUSH) -> bytes:
    """OPEN's and OPENDIR's answer. Handles carry nothing: the node id says all, to a successor too."""
    return _OPEN_OUT.pack(0, flags, 0)


def statfs_reply() -> bytes:
    """STATFS's answer: a filesystem without room."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, 0)


def readdir_reply(entries: Iterable[tuple[int, bytes]], offset: int, size: int) -> bytes:
    """READDIR's answer: `.` and `..`, then (node id, name) entries, from position `offset`, at most `size` bytes."""
    out = bytearray()
    for position, (node, text) in enumerate([(ROOT_NODE, b"."), (ROOT_NODE, b".."), *entries], 1):
        if position <= offset:
            continue
        kind = _DT_DIR if node == ROOT_NODE else _DT_REG
        record = _DIRENT.pack(node, position, len(text), kind) + text
        record += bytes(-len(record) % 8)
        if len(out) + len(record) > size:
            break
        out += record
    return bytes(out)
