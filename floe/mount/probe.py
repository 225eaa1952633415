"""Does this kernel tell when a file below an EROFS mount is too short?

Before a fix of March 2026 (in 6.12.117 and 7.0) file-backed EROFS filled what was missing with zeros and called the
read good. The probe mounts a tree of one file whose pack is cut in half, and reads it: anything but EIO, or a refusal to
mount files of this folder at all (overlayfs and tmpfs: ENOTBLK), means loop devices.
"""

from __future__ import annotations

import errno
import stat
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from floe.mount.runner import MountRunner, OperationError
from floe.store import erofs
from floe.store.packindex import BLOCK

_FILE = "probe"
_BLOCKS = 8  # of the file and its pack, of which the second half is missing
_CHUNK_BITS = 15  # log2 of the file's 32 KiB
_SLOT = erofs.SLOT
_ROOT_NID = (erofs.SUPERBLOCK_OFFSET + 2 * erofs.DEVICE.size) // _SLOT + 4  # after superblock and device table
_FILE_NID = _ROOT_NID + 8


@dataclass(frozen=True)
class Probed:
    """`files`: EROFS may be mounted straight from files of the folder. `why` says why not."""

    files: bool
    why: str = ""


def probe_image() -> bytes:
    """A tree of one 32 KiB file in one pack, in one block."""
    image = bytearray(BLOCK)
    table = erofs.SUPERBLOCK_OFFSET + erofs.DEVICE.size
    erofs.DEVICE.pack_into(image, table, b"probe", _BLOCKS, 0)
    names = sorted(
        [(b".", _ROOT_NID, stat.S_IFDIR), (b"..", _ROOT_NID, stat.S_IFDIR), (_FILE.encode(), _FILE_NID, stat.S_IFREG)]
    )
    offset = len(names) * erofs.DIRENT.size
    entries = b""
    for name, nid, kind in names:
        entries += erofs.DIRENT.pack(nid, offset, erofs.FILE_TYPES[kind], 0)
        offset += len(name)
    entries += b"".join(name for name, _, _ in names)
    _put(image, _ROOT_NID, entries, mode=stat.S_IFDIR | 0o700, layout=erofs.LAYOUT_INLINE, size=len(entries), links=2)
    chunk_format = erofs.CHUNK_INDEXES | (_CHUNK_BITS - erofs.BLOCK_BITS)
    chunk = erofs.CHUNK_INDEX.pack(0, 1, 0)
    size = _BLOCKS * BLOCK
    _put(image, _FILE_NID, chunk, mode=stat.S_IFREG | 0o600, layout=erofs.LAYOUT_CHUNKED, size=size, block=chunk_format)
    features = erofs.INCOMPAT_CHUNKED | erofs.INCOMPAT_DEVICES
    erofs.SUPERBLOCK.pack_into(
        image, erofs.SUPERBLOCK_OFFSET, erofs.MAGIC, 0, erofs.COMPAT_CHECKSUM | erofs.COMPAT_MTIME, erofs.BLOCK_BITS,
        0, _ROOT_NID, 2, 0, 0, 1, 0, 0, bytes(16), b"probe", features, 0, 1, table // erofs.DEVICE.size, 0, 0, 0, 0, 0,
    )  # fmt: skip
    struct.pack_into("<I", image, erofs.SUPERBLOCK_OFFSET + 4, erofs.superblock_checksum(image))
    return bytes(image)


def _put(
    image: bytearray, nid: int, tail: bytes, *, mode: int, layout: int, size: int, block: int = 0, links: int = 1
) -> None:
    inode = erofs.INODE.pack(erofs.EXTENDED | layout << 1, 0, mode, 0, size, block, nid, 0, 0, 0, 0, links)
    image[nid * _SLOT : nid * _SLOT + len(inode) + len(tail)] = inode + tail


def probe(runner: MountRunner, folder: Path) -> Probed:
    """Try it with files in `folder`, which are removed again.

    OperationError ENODEV without EROFS in the kernel; DeadlineError, or OSError of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="probe-", dir=folder) as name:
        image, pack = Path(name, "image"), Path(name, "pack")
        image.write_bytes(probe_image())
        pack.write_bytes(b"\xa5" * (BLOCK * _BLOCKS // 2))
        try:
            answer = runner.run("probe", source=str(image), devices=[str(pack)], name=_FILE, length=_BLOCKS * BLOCK)
        except OperationError as error:
            if error.errno == errno.ENODEV:
                raise
            return Probed(False, f"EROFS is not mounted from files in {folder}: {error}")
    if answer["errno"] != errno.EIO or answer["read"] > BLOCK * _BLOCKS // 2:
        return Probed(False, "this kernel reads zeros where a file below an EROFS mount is too short")
    return Probed(True)
