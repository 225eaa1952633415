"""An image as big as people's: three layers, 500 MiB and 20,000 files and more, a few of them nasty.

Every directory and everything the runtime would otherwise make has an entry, as in images that Docker builds, so that
nothing of the tree depends on when it was unpacked.
"""

from __future__ import annotations

import os
import stat
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from support.images import BuiltImage, add, build_oci
from support.pythonimage import ENV, PYTHON, app_layers

MIB = 1 << 20
FILES, BYTES = 20_000, 500 * MIB
_BULK = {"bulk_files": 19_500, "bulk_bytes": 445 * MIB}  # of the last layer; the two below bring the rest
COMMAND = (PYTHON, "/app/main.py")
PROGRAM = """
import hashlib, json, pathlib, sqlite3, ssl, zlib
import blake3, grpc, zstandard
seen = sorted(str(p) for p in pathlib.Path("/usr/bin").iterdir())
print(json.dumps({
    "modules": [grpc.__version__, zstandard.__version__, ssl.OPENSSL_VERSION, sqlite3.sqlite_version],
    "own": blake3.blake3(pathlib.Path(__file__).read_bytes()).hexdigest(), "bin": seen,
}), flush=True)
"""
_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
_ANYBODY = 2**32 - 1
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in [(1, 6, _ANYBODY), (2, 5, 7), (4, 4, _ANYBODY), (16, 7, _ANYBODY), (32, 0, _ANYBODY)]
)


@dataclass(frozen=True)
class ScaleImage:
    """`files` regular files of `content` bytes in the layers' tars, which are `size` bytes."""

    built: BuiltImage
    files: int
    content: int

    @property
    def size(self) -> int:
        return sum(layer["size"] for layer in self.built.layers)


def build(directory: Path) -> ScaleImage:
    """Write the image; some ten seconds."""
    base, python, application = app_layers(PROGRAM, **_BULK)
    counted = [0, 0]
    layers = [_explicit(fill, counted) for fill in (_both(_before, base), python, _both(application, _nasty))]
    built = build_oci(directory, layers, tag="1", command=COMMAND, env=ENV, compression="none")
    return ScaleImage(built, *counted)


def _both(*fills: Callable[[tarfile.TarFile], None]) -> Callable[[tarfile.TarFile], None]:
    def fill(tar: tarfile.TarFile) -> None:
        for each in fills:
            each(tar)

    return fill


def _explicit(fill: Callable[[tarfile.TarFile], None], counted: list[int]) -> Callable[[tarfile.TarFile], None]:
    """Put an entry for each directory before what is in it, and count regular files and their bytes."""

    def whole(tar: tarfile.TarFile) -> None:
        addfile, made = tar.addfile, set()

        def with_parents(info: tarfile.TarInfo, content: IO[bytes] | None = None) -> None:
            for parent in reversed(PurePosixPath(info.name).parents[:-1]):
                if str(parent) not in made:
                    made.add(str(parent))
                    directory = tarfile.TarInfo(str(parent))
                    directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
                    addfile(directory)
            if info.isdir():
                made.add(info.name)
            if info.isreg():
                counted[0] += 1
                counted[1] += info.size
            addfile(info, content)

        tar.addfile = with_parents  # type: ignore[method-assign]
        fill(tar)

    return whole


def _before(tar: tarfile.TarFile) -> None:
    """What the runtime mounts upon, and what the last layer takes away or changes."""
    for name in ("dev", "proc", "sys", "run", "etc"):
        add(tar, name, mode=0o755, kind=tarfile.DIRTYPE)
    for name in ("hosts", "hostname", "resolv.conf", "gone"):
        add(tar, f"etc/{name}")
    add(tar, "old/hidden", b"hidden")
    add(tar, "old/folder/file", b"x")
    add(tar, "old/file", b"a file")
    add(tar, "old/linked", b"linked", mode=0o600)


def _nasty(tar: tarfile.TarFile) -> None:
    def text(value: bytes) -> str:
        return os.fsdecode(value)

    directory = tarfile.DIRTYPE
    add(tar, "etc", mode=0o751, kind=directory, mtime=1_600_000_000.25)
    add(tar, "etc/.wh.gone")
    add(tar, "old", mode=0o755, kind=directory)
    add(tar, "old/.wh..wh..opq")
    add(tar, "old/new", b"new")
    add(tar, "old/file", mode=0o711, kind=directory, uid=12)
    add(tar, "old/file/inside", b"a directory now")
    add(tar, "n/setuid", b"#!", mode=0o6755, uid=4_000_000_000, gid=70_000)
    add(tar, "n/link", kind=tarfile.LNKTYPE, link="n/setuid", mode=0o6755, uid=4_000_000_000, gid=70_000)
    add(tar, "n/third", kind=tarfile.LNKTYPE, link="n/setuid", mode=0o6755, uid=4_000_000_000, gid=70_000)
    add(tar, "n/symlink", kind=tarfile.SYMTYPE, link="../nowhere/" + "x" * 200, mode=0o777, uid=5)
    add(tar, "n/symlink-too", kind=tarfile.LNKTYPE, link="n/symlink", mode=0o777, uid=5)
    add(tar, "n/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    add(tar, "n/disk", kind=tarfile.BLKTYPE, mode=0o660, device=(259, 300))
    add(tar, "n/fifo", kind=tarfile.FIFOTYPE, mode=0o622)
    add(tar, "n/sticky", mode=0o3777, kind=directory, gid=3)
    add(tar, "n/" + "d/" * 60 + "n" * 255, b"deep")
    add(tar, "n/" + text(b"raw-\xff\xfe\x01"), b"raw")
    add(tar, "n/käse-日本", b"utf")
    add(tar, "n/empty", mode=0)
    add(tar, "n/holes", bytes(9_000_000) + b"end")
    add(tar, "n/capable", b"#!", mode=0o755, xattrs={"security.capability": text(_CAPABILITY)})
    add(tar, "n/attrs", b"x", xattrs={"user.bytes": text(bytes(range(256))), "user.empty": ""})
    add(tar, "n/acl", b"x", mode=0o640, xattrs={"system.posix_acl_access": text(_ACL)})
    add(tar, "n/acls", kind=directory, mode=0o750, xattrs={"system.posix_acl_default": text(_ACL)})
    exact = tarfile.TarInfo("n/exact")
    exact.pax_headers = {"mtime": "1700000000.123456789"}
    tar.addfile(exact)


def check_nasty(facts: Mapping[bytes, tuple[object, ...]]) -> None:
    """That what `_nasty` wrote arrived in a container: a comparison of trees without it would prove little."""
    assert not facts.keys() & {b"/etc/gone", b"/old/hidden", b"/old/folder", b"/old/linked"}
    assert facts.keys() >= {b"/old/new", b"/old/file/inside", b"/n/raw-\xff\xfe\x01", b"/n/disk", b"/n/fifo"}
    assert facts[b"/n/capable"][-1] == (("security.capability", _CAPABILITY),)
    assert facts[b"/n/third"][:3] == (stat.S_IFREG | 0o6755, 4_000_000_000, 70_000)
    assert facts[b"/n/third"][4] == 3
    assert facts[b"/n/third"][-1] == b"/n/link"
    assert facts[b"/n/exact"][3] == 1_700_000_000_123_456_789
    assert facts[b"/etc"][3] == 1_600_000_000_250_000_000
