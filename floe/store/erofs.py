"""EROFS on disk: the parts of the format that Floe's trees use, as constants and structs. Pure.

Source: Linux, fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst. A tree is metadata only: extended inodes
in the first device, all file data in external devices (packs), found through chunk indexes. All numbers are little
endian, all block numbers count 4 KiB blocks, a nid counts 32-byte slots from the start of the image.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import Buffer, is_hexdigest
from floe.store.packindex import BLOCK

BLOCK_BITS = 12
SLOT = 32  # bytes; nids count these
SUPERBLOCK_OFFSET = 1024  # bytes
MAGIC = 0xE0F5E1E2
HOLE = 0xFFFFFFFF  # as a chunk's block: no data, reads as zeros
NO_BLOCK = 0xFFFFFFFF  # as an inode's block: there is none
MAX_DEVICES = 256  # packs of a tree; the format allows 65,535
NAME_MAX = 255
LINK_MAX = 4095  # bytes of a symlink's target: the kernel ends it with NUL within one page

COMPAT_CHECKSUM, COMPAT_MTIME = 0x1, 0x2
INCOMPAT_CHUNKED, INCOMPAT_DEVICES = 0x4, 0x8

# magic, checksum, compat, block bits, extension slots, root nid, inodes, build time, build nanoseconds, blocks,
# metadata block, shared xattr block, uuid, volume name, incompat, compression, extra devices, device table slot
# (of 128 bytes), directory block bits, long xattr prefixes, their start, packed nid, xattr filter
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
# tag, blocks, mapped block
DEVICE = struct.Struct("<64sII56x")
# format, xattr count, mode, zero, size, block or device number or chunk format, 32-bit inode number, uid, gid,
# mtime (signed), its nanoseconds, links
INODE = struct.Struct("<HHHHQIIIIqII16x")
# nid, offset of the name in its block, file type, zero
DIRENT = struct.Struct("<QHBB")
# advice, device (1 is the first pack), block
CHUNK_INDEX = struct.Struct("<HHI")
# name filter, shared count; then the entries
XATTR_HEADER = struct.Struct("<IB7x")
# length of the name after its prefix, prefix, length of the value
XATTR_ENTRY = struct.Struct("<BBH")

EXTENDED = 1  # bit 0 of an inode's format: 64 bytes
LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNKED = 0, 2, 4  # bits 1 to 3
CHUNK_INDEXES = 0x20  # in the chunk format: 8-byte indexes; bits 0 to 4 are chunk bits less block bits

FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
XATTR_PREFIXES = {1: b"user.", 4: b"trusted.", 6: b"security."}
XATTR_ACLS = {2: b"system.posix_acl_access", 3: b"system.posix_acl_default"}  # whole names, nothing follows
XATTR_VALUE_MAX = 0xFFFF  # bytes
XATTR_BODY_MAX = XATTR_HEADER.size + 4 * (0xFFFF - 1)  # bytes, from the 16-bit count in the inode

_CASTAGNOLI = 0x82F63B78


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CASTAGNOLI if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


def superblock_checksum(first_block: Buffer) -> int:
    """CRC-32C, seeded with ones and not inverted, of the first block from the superblock on, its checksum field zero."""
    table = _crc_table()
    data = bytearray(first_block[SUPERBLOCK_OFFSET:BLOCK])
    data[4:8] = bytes(4)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def encode_device(rdev: int) -> int:
    """os.makedev's number as the kernel's new_encode_dev (include/linux/kdev_t.h): 12 bits major, 20 minor."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12) & 0xFFFFFFFF


def decode_device(value: int) -> int:
    """The inverse of `encode_device`."""
    return os.makedev((value & 0xFFF00) >> 8, value & 0xFF | value >> 12 & 0xFFF00)


def xattr_name_parts(name: bytes) -> tuple[int, bytes] | None:
    """(prefix number, rest of the name); None when EROFS has no prefix for this name."""
    for number, whole in XATTR_ACLS.items():
        if name == whole:
            return number, b""
    for number, prefix in XATTR_PREFIXES.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            return number, name[len(prefix) :]
    return None


@dataclass(frozen=True, slots=True)
class Superblock:
    """What Floe reads of a superblock, checked. `blocks` are the image's own; `devices` its packs."""

    root_nid: int
    inodes: int
    blocks: int
    uuid: bytes
    devices: int
    device_offset: int


def parse_superblock(image: Buffer, size: int, what: str) -> Superblock:
    """Check the first block(s) of an image of `size` bytes; `what` names it in DamagedError and UnsupportedError."""
    if size < BLOCK or size % BLOCK or len(image) < BLOCK:
        raise DamagedError(f"{what} is {size} bytes, not whole 4 KiB blocks")
    (magic, checksum, compat, bits, extensions, root, inodes, _, _, blocks, meta, shared, uuid, _,
     incompat, compression, devices, slot, dir_bits, prefixes, long, packed, names) = SUPERBLOCK.unpack_from(image, SUPERBLOCK_OFFSET)  # fmt: skip
    if magic != MAGIC:
        raise DamagedError(f"{what} is not an EROFS image")
    if not compat & COMPAT_CHECKSUM or superblock_checksum(image) != checksum:
        raise DamagedError(f"{what} has a superblock that does not match its checksum")
    unknown = incompat & ~(INCOMPAT_CHUNKED | INCOMPAT_DEVICES) or compat & ~(COMPAT_CHECKSUM | COMPAT_MTIME)
    if unknown or bits != BLOCK_BITS or extensions or dir_bits:
        raise UnsupportedError(
            f"{what} uses EROFS features {incompat:#x} and {compat:#x}, which this Floe does not read",
            hint="upgrade Floe on this node",
        )
    if any((meta, shared, compression, prefixes, long, packed, names)) or blocks * BLOCK != size:
        raise DamagedError(f"{what} has a superblock that does not fit its {size} bytes")
    if devices > MAX_DEVICES or bool(devices) != bool(incompat & INCOMPAT_DEVICES):
        raise DamagedError(f"{what} lists {devices} packs")
    offset = slot * DEVICE.size
    if devices and (offset < SUPERBLOCK_OFFSET + SUPERBLOCK.size or offset + devices * DEVICE.size > size):
        raise DamagedError(f"{what} has its list of packs outside of the image")
    return Superblock(root, inodes, blocks, uuid, devices, offset)


def read_device_table(image: Buffer | Path, what: str = "") -> list[tuple[str, int]]:
    """The packs of a tree in the order of its device table: (pack id, blocks of content).

    `image` is the whole image or its file, of which only the head is read. DamagedError, UnsupportedError; OSError
    when the file cannot be read.
    """
    if isinstance(image, Path):
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head: Buffer = file.read(_HEAD)
        return _device_table(head, size, what or f"tree {image}")
    return _device_table(image, len(image), what or "tree image")


_HEAD = 1 << 16  # bytes; superblock and the largest device table lie in these


def _device_table(head: Buffer, size: int, what: str) -> list[tuple[str, int]]:
    superblock = parse_superblock(head, size, what)
    start, end = superblock.device_offset, superblock.device_offset + superblock.devices * DEVICE.size
    if len(head) < end:
        raise DamagedError(f"{what} has its list of packs outside of the image")
    table = []
    for tag, blocks, mapped in DEVICE.iter_unpack(head[start:end]):
        pack_id = tag.decode("ascii", "replace")
        if not is_hexdigest(pack_id) or not blocks or mapped:
            raise DamagedError(f"{what} names a pack that cannot be one: {pack_id!r}")
        table.append((pack_id, blocks))
    if len({pack_id for pack_id, _ in table}) != len(table):
        raise DamagedError(f"{what} names a pack twice")
    return table
