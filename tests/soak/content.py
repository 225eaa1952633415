"""Trees made from a seed: every byte of every file can be had again at any time, so what is read needs no second copy.

A tree is a mapping of paths, relative and in surrogate escapes, to entries. It becomes a directory (for `floe model push`)
or layers of a tar (for an image), goes as JSON to those who read, and says what they must find.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import stat
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from blake3 import blake3

KIB, MIB = 1 << 10, 1 << 20
SUMS = "SUMS"  # lists the files whose names a shell can bear, as md5sum does
_ZEROS = "zeros"
# On both sides of a block, of a frame of a layer, and of a chunk.
_SIZES = (0, 1, 4095, 4096, 4097, 10_000, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1, 300 * KIB)
_NAMES = ("with space", "new\nline", "ünïcødé ☃", os.fsdecode(b"raw-\xff\xfe\x01"), "n" * 255, "'quote\"", "-dash")


@dataclass(frozen=True)
class Entry:
    """What lstat, readlink and listxattr tell. `key` names a file's content; files of one `inode` are hard links."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1_700_000_000 * 10**9
    size: int = 0
    key: str = ""
    text: str = ""  # content that is no random one
    link: str = ""
    inode: str = ""
    rdev: int = 0
    xattrs: dict[str, str] = field(default_factory=dict)  # values in hex

    def content(self, start: int, length: int) -> bytes:
        """The file's bytes from `start` on, `length` of them or as many as there are."""
        length = max(0, min(length, self.size - start))
        if self.text:
            return self.text.encode()[start : start + length]
        return bytes(length) if self.key == _ZEROS else blake3(self.key.encode()).digest(length=length, seek=start)


Tree = dict[str, Entry]


def random_tree(rng: random.Random, *, big: int, model: bool) -> Tree:
    """Every kind of entry that a model or a layer may have; `big` bytes in one of its files."""
    tree: Tree = {}
    number = 0

    def put(path: str, size: int, mode: int = 0o644, **more: object) -> None:
        nonlocal number
        number += 1
        more.setdefault("key", f"{rng.getrandbits(64):016x}")
        tree[path] = Entry(stat.S_IFREG | mode, size=size, mtime_ns=_when(number), **more)  # type: ignore[arg-type]

    for path, mode in (
        ("plain", 0o755),
        ("plain/deep", 0o750),
        ("plain/deep/er", 0o711),
        ("odd", 0o755),
        ("empty", 0o700),
    ):
        tree[path] = Entry(stat.S_IFDIR | mode, mtime_ns=_when(len(tree)))
    tree["odd/sticky"] = Entry(stat.S_IFDIR | 0o1777, uid=1000, gid=70_000)
    put("plain/big", big)
    put("plain/middle", 4 * MIB + rng.choice((-1, 0, 1)))
    put("plain/zeros", 5 * MIB, key=_ZEROS)
    for place in ("plain", "plain/deep", "plain/deep/er"):
        for size in rng.sample(_SIZES, 5):
            put(f"{place}/f{number}", size, rng.choice((0o600, 0o644, 0o755)))
    for name in _NAMES:
        put(f"odd/{name}", rng.randrange(20_000))
    put("odd/setid", 5000, 0o6755, uid=4_000_000_000, gid=70_000)
    put("odd/attributes", 77, xattrs={"user.bytes": bytes(range(256)).hex(), "user.empty": ""})
    put("odd/hard", 9000, inode="odd/hard")
    tree["odd/sticky/hard too"] = tree["odd/hard"]
    tree["odd/link"] = Entry(stat.S_IFLNK | 0o777, link="../plain/big")
    if not model:
        tree["odd/dangling"] = Entry(stat.S_IFLNK | 0o777, link="/nowhere/" + "x" * 200, uid=5)
        tree["odd/fifo"] = Entry(stat.S_IFIFO | 0o622)
        tree["odd/null"] = Entry(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
        tree["odd/disk"] = Entry(stat.S_IFBLK | 0o660, rdev=os.makedev(259, 300))
    return with_sums(tree)


# Bytes of a name at most for which a layer can say that it is gone: with `.wh.` before it, it must be a name itself.
_CAN_GO = 255 - len(".wh.")


def next_version(rng: random.Random, tree: Tree) -> Tree:
    """Another state of a tree: a third of its files differ, some are gone, some are new."""
    changed = dict(tree)
    for path, entry in tree.items():
        if not stat.S_ISREG(entry.mode) or entry.inode or entry.text or rng.random() > 0.4:
            continue
        if rng.random() < 0.2 and path != "plain/big" and len(os.fsencode(path.rpartition("/")[2])) <= _CAN_GO:
            del changed[path]
        else:
            changed[path] = replace(entry, key=f"{rng.getrandbits(64):016x}", mtime_ns=entry.mtime_ns + 10**9)
    for _ in range(3):
        name, size = f"plain/new{rng.getrandbits(32):08x}", rng.randrange(600 * KIB)
        changed[name] = Entry(stat.S_IFREG | 0o640, size=size, key=name)
    return with_sums(changed)


def with_sums(tree: Tree) -> Tree:
    """The tree with a file SUMS at its top."""
    lines = []
    for path, entry in sorted(tree.items()):
        if stat.S_ISREG(entry.mode) and path.startswith("plain/"):
            lines.append(f"{hashlib.md5(entry.content(0, entry.size), usedforsecurity=False).hexdigest()}  {path}\n")
    text = "".join(lines)
    return {**tree, SUMS: Entry(stat.S_IFREG | 0o644, size=len(text), text=text)}


def summed_bytes(tree: Tree) -> int:
    """How many bytes `md5sum -c SUMS` reads."""
    return sum(entry.size for path, entry in tree.items() if stat.S_ISREG(entry.mode) and path.startswith("plain/"))


def as_model(tree: Tree) -> Tree:
    """What a mount shows of a directory that was pushed as a model: docs/SEMANTICS.md, "Models"."""

    def shown(entry: Entry) -> Entry:
        allowed = 0o444 if stat.S_ISREG(entry.mode) else 0o555
        mode = stat.S_IFMT(entry.mode) | (entry.mode & 0o777) | allowed
        return replace(entry, mode=mode, uid=0, gid=0, mtime_ns=entry.mtime_ns + (entry.mtime_ns % 10**9 == 0))

    return {path: shown(entry) for path, entry in tree.items()}


def write_directory(tree: Tree, place: Path) -> None:
    """The tree as a directory, which must not be there yet."""
    place.mkdir()
    first: dict[str, Path] = {}
    for path, entry in sorted(tree.items()):
        target = place / path
        if entry.inode in first:
            os.link(first[entry.inode], target)
            continue
        if stat.S_ISDIR(entry.mode):
            target.mkdir()
        elif stat.S_ISLNK(entry.mode):
            target.symlink_to(entry.link)
        else:
            target.write_bytes(entry.content(0, entry.size))
            first[entry.inode or path] = target
        os.chown(target, entry.uid, entry.gid, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            target.chmod(stat.S_IMODE(entry.mode))
            for name, value in entry.xattrs.items():
                os.setxattr(target, name, bytes.fromhex(value))
    for path, entry in sorted(tree.items(), reverse=True):  # a directory's own time after all in it
        os.utime(place / path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def layer(tree: Tree, below: str, before: Tree | None = None) -> bytes:
    """A tar of what differs from `before`, or of all, under the directory `below`; with whiteouts for what is gone."""
    before = before or {}
    wanted = {path for path, entry in tree.items() if before.get(path) != entry}
    gone = before.keys() - tree.keys()
    parents = {str(parent) for path in wanted | gone for parent in Path(path).parents if str(parent) != "."}
    buffer = io.BytesIO()
    first: dict[str, str] = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        top = tarfile.TarInfo(below)
        top.type, top.mode, top.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
        tar.addfile(top)
        for path in sorted(wanted | parents):
            entry = tree[path]
            info = _tar_entry(f"{below}/{path}", entry)
            if entry.inode in first:
                info.type, info.linkname, info.size = tarfile.LNKTYPE, first[entry.inode], 0
            elif entry.inode:
                first[entry.inode] = info.name
            tar.addfile(info, io.BytesIO(entry.content(0, info.size)) if info.size else None)
        for path in sorted(gone):
            folder, _, name = f"{below}/{path}".rpartition("/")
            tar.addfile(tarfile.TarInfo(f"{folder}/.wh.{name}"))
    return buffer.getvalue()


_TAR_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _tar_entry(name: str, entry: Entry) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = _TAR_TYPES[stat.S_IFMT(entry.mode)], stat.S_IMODE(entry.mode)
    info.uid, info.gid, info.linkname = entry.uid, entry.gid, entry.link
    info.size = entry.size if stat.S_ISREG(entry.mode) else 0
    info.devmajor, info.devminor = os.major(entry.rdev), os.minor(entry.rdev)
    seconds, ns = divmod(entry.mtime_ns, 10**9)
    info.mtime = seconds
    info.pax_headers = {f"SCHILY.xattr.{key}": os.fsdecode(bytes.fromhex(value)) for key, value in entry.xattrs.items()}
    if ns:
        info.pax_headers["mtime"] = f"{seconds}.{ns:09}"
    return info


def save(tree: Tree, file: Path) -> Path:
    """As JSON, for `load`."""
    file.write_text(json.dumps({path: asdict(entry) for path, entry in tree.items()}))
    return file


def load(file: Path) -> Tree:
    """What `save` wrote."""
    return {path: Entry(**fields) for path, fields in json.loads(file.read_text()).items()}


def link_counts(tree: Tree) -> Counter[str]:
    """By `inode`: how many names it has."""
    return Counter(entry.inode for entry in tree.values() if entry.inode)


def _when(number: int) -> int:
    return 1_600_000_000 * 10**9 + number * 86_400_123_456_789
