"""Disks that are files behind loop devices, and what may lie on one."""

from __future__ import annotations

import binascii
import hashlib
import os
import struct
import subprocess
import zlib
from pathlib import Path

MIB = 1 << 20
SIZE = 32 * MIB
_SECTOR = 512


class LoopDisk:
    """`file` as the disk `device`; `options`: of losetup."""

    def __init__(self, file: Path, *options: str, size: int = SIZE) -> None:
        self.file, self.device = file, ""
        if not file.exists():
            file.touch()
            os.truncate(file, size)
        self.attach(*options)

    def attach(self, *options: str, device: str = "") -> None:
        """Have it a device again: that one, or any that is free."""
        words = ["losetup", *options, *([device] if device else ["--find", "--show"]), self.file]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        self.device = device or done.stdout.strip()

    def detach(self) -> None:
        """Pull it out."""
        if self.device:
            subprocess.run(["losetup", "--detach", self.device], check=True)
            self.device = ""

    def write(self, offset: int, data: bytes) -> None:
        """Bytes on the disk; before its end when the offset is negative."""
        with Path(self.device).open("r+b") as file:
            file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def probe(self) -> dict[str, str]:
        """What blkid finds on it: TYPE, LABEL, UUID, PTTYPE."""
        done = subprocess.run(
            ["blkid", "--probe", "--output", "export", self.device], check=False, capture_output=True, text=True
        )
        return dict(line.partition("=")[::2] for line in done.stdout.splitlines())

    def digest(self) -> str:
        """Of all that is on it."""
        with Path(self.device).open("rb") as file:
            total = hashlib.sha256()
            for piece in iter(lambda: file.read(MIB), b""):
                total.update(piece)
            return total.hexdigest()

    def is_zeros(self) -> bool:
        """Whether it is as new."""
        with Path(self.device).open("rb") as file:
            return all(not any(piece) for piece in iter(lambda: file.read(MIB), b""))


# what lies on disks: each writes it, and says what blkid must call it


def ext4(disk, label="mine"):
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", label, disk.device], check=True)
    return {"TYPE": "ext4", "LABEL": label}


def swap(disk):
    subprocess.run(["mkswap", disk.device], check=True, capture_output=True)
    return {"TYPE": "swap"}


def mbr(disk):
    """A partition table as DOS has it, with one Linux partition."""
    entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, 2048, SIZE // _SECTOR - 2048)
    disk.write(446, entry + b"\0" * 48 + b"\x55\xaa")
    return {"PTTYPE": "dos"}


def gpt(disk):
    """UEFI 2.10, 5.3: a protective MBR, a header, and an empty array of entries; no second copy at the end."""
    last = SIZE // _SECTOR - 1
    protective = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0xEE, b"\xff" * 3, 1, last)
    disk.write(446, protective + b"\0" * 48 + b"\x55\xaa")
    entries = bytes(128 * 128)
    fields = (1, last, 34, last - 33, os.urandom(16), 2, 128, 128, zlib.crc32(entries))

    def header(crc):
        return b"EFI PART" + struct.pack("<IIII", 0x10000, 92, crc, 0) + struct.pack("<QQQQ16sQIII", *fields)

    disk.write(_SECTOR, header(zlib.crc32(header(0))))
    return {"PTTYPE": "gpt"}


def lvm(disk):
    """A physical volume's label (lib/format_text/layout.h of LVM2), in the second sector."""
    volume = binascii.hexlify(os.urandom(16)) + struct.pack("<Q", SIZE)
    rest = (struct.pack("<I", 32) + b"LVM2 001" + volume).ljust(_SECTOR - 20, b"\0")
    crc = ~zlib.crc32(rest, ~0xF597A6CF & 0xFFFFFFFF) & 0xFFFFFFFF
    disk.write(_SECTOR, b"LABELONE" + struct.pack("<QI", 1, crc) + rest)
    return {"TYPE": "LVM2_member"}


def raid(disk, name="host:array"):
    """A superblock of version 1.2 (Linux, include/uapi/linux/raid/md_p.h), 4 KiB from the start."""
    head = struct.pack("<IIII16s32s", 0xA92B4EFC, 1, 0, 0, os.urandom(16), name.encode())
    disk.write(4096, head.ljust(144, b"\0") + struct.pack("<Q", 8))
    return {"TYPE": "linux_raid_member", "LABEL": name}


def luks(disk):
    """A LUKS header of version 1."""
    disk.write(0, b"LUKS\xba\xbe\0\x01" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0") + b"sha256")
    return {"TYPE": "crypto_LUKS"}


def text(disk):
    disk.write(0, b"somebody's data")
    return {}


def text_at_the_end(disk):
    disk.write(-16, b"somebody's data")
    return {}


def text_in_between(disk):
    disk.write(SIZE // 2, b"somebody's data")
    return {}
