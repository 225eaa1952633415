"""Node tree to EROFS image: a pure plan of all sizes and places, then emission. Equal trees give equal bytes.

The image: superblock at 1024, device table (one 128-byte entry a pack), inodes with their xattrs, chunk indexes and
small inline tails, then whole blocks of directories and long symlinks. The children of a directory lie together, so
that listing and stat-ing it reads few blocks. The plan decides for each inode:

- its tail (the last block of a directory, a symlink's target) lies inline when inode, xattrs and tail fit one block
  together, else in a block of its own: the kernel refuses inline data that crosses a block;
- an inode starts on a 32-byte slot and its 64 bytes do not cross a block;
- chunk indexes follow inode and xattrs, aligned to 8 bytes.

The uuid is the head of the image's blake3 with the uuid zero, so that it says which content this is.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from floe.ingest.entries import Chunk, FileContent, Node
from floe.store import erofs
from floe.store.errors import BadInputError
from floe.store.ids import digest
from floe.store.nodes import INODES_MAX, blocks
from floe.store.packindex import BLOCK
from floe.store.treeobject import MAX_IMAGE

_DOT, _DOTDOT = b".", b".."
_DIR_TYPE = erofs.FILE_TYPES[stat.S_IFDIR]
_DEVICES_OFFSET = erofs.SUPERBLOCK_OFFSET + erofs.SUPERBLOCK.size
_U32 = 0xFFFFFFFF


@dataclass(slots=True, eq=False)
class _Place:
    """Where one inode goes. `offset` and `header` (inode and xattrs) are in bytes, `first_block` in blocks."""

    node: Node
    name: bytes
    parent: _Place | None
    links: int = 1
    xattrs: bytes = b""
    offset: int = 0
    header: int = 0
    layout: int = erofs.LAYOUT_PLAIN
    size: int = 0
    tail: int = 0
    first_block: int = erofs.NO_BLOCK
    full_blocks: int = 0
    names: Sequence[bytes] = ()
    splits: Sequence[int] = ()

    @property
    def nid(self) -> int:
        return self.offset // erofs.SLOT


@dataclass(frozen=True)
class ImagePlan:
    """All decisions about an image of `blocks` blocks whose device table is `packs` (id, blocks of content).

    `warnings` name what a tree cannot hold and was left out: extended attributes that EROFS has no way to store.
    """

    places: list[_Place]
    by_node: dict[int, _Place]
    packs: list[tuple[str, int]]
    data_block: int
    blocks: int
    warnings: list[str]


def build_image(root: Node, pack_blocks: Mapping[str, int]) -> bytes:
    """`write_image(plan_image(...))`, for callers that need no warnings."""
    return write_image(plan_image(root, pack_blocks))


def plan_image(root: Node, pack_blocks: Mapping[str, int]) -> ImagePlan:
    """Decide all sizes and places. `pack_blocks`: blocks of content of every pack that a chunk may name.

    Raises BadInputError for a tree that EROFS cannot hold: names, owners, times, devices or links out of range, more
    than 256 packs, a directory at two places, a chunk outside of its pack.
    """
    if not root.is_dir:
        raise BadInputError("the root of a tree is not a directory")
    places = _order(root)
    by_node = {id(place.node): place for place in places}
    warnings: list[str] = []
    packs = _used_packs(places, pack_blocks)
    position = _DEVICES_OFFSET + len(packs) * erofs.DEVICE.size
    blobs = 0
    for place in places:
        _check(place)
        place.xattrs = _xattr_body(place, warnings)
        _measure(place)
        position = _align(position, place)
        place.offset = position
        position += place.header + place.tail
        place.first_block = blobs
        blobs += place.full_blocks
    data_block = blocks(position)
    for place in places:
        place.first_block = place.first_block + data_block if place.full_blocks else erofs.NO_BLOCK
    if len(places) > INODES_MAX or (data_block + blobs) * BLOCK > MAX_IMAGE:
        raise BadInputError(
            f"a tree of {len(places)} inodes and {(data_block + blobs) * BLOCK} bytes of metadata is too large",
            hint=f"at most {INODES_MAX} inodes and {MAX_IMAGE} bytes are stored: split it over several layers or models",
        )
    return ImagePlan(places, by_node, packs, data_block, data_block + blobs, warnings)


def _order(root: Node) -> list[_Place]:
    """Places of all inodes in image order, with names sorted and links counted."""
    top = _Place(root, b"", None)
    places, seen, pending = [top], {id(root): top}, [top]
    while pending:
        place = pending.pop()
        children = place.node.children
        names = sorted((_DOT, _DOTDOT, *children))
        if _DOT in children or _DOTDOT in children:
            raise BadInputError(f"{_path(place)} holds a name that is '.' or '..'")
        place.names, place.links, below = names, 2, []
        for name in names:
            child = children.get(name)
            if child is None:
                continue
            known = seen.get(id(child))
            if child.is_dir:
                if known is not None:
                    raise BadInputError(f"directory {_path(known)} appears a second time in {_path(place)}")
                place.links += 1
            elif known is not None:
                known.links += 1
                continue
            if not 0 < len(name) <= erofs.NAME_MAX or b"/" in name or b"\0" in name:
                raise BadInputError(f"{name!r} in {_path(place)} is no valid file name")
            seen[id(child)] = made = _Place(child, name, place)
            places.append(made)
            if child.is_dir:
                below.append(made)
        pending.extend(reversed(below))
    return places


def _path(place: _Place) -> str:
    names = []
    here: _Place | None = place
    while here is not None:
        names.append(here.name)
        here = here.parent
    return b"/".join(reversed(names)).decode("utf-8", "backslashreplace") or "/"


def _used_packs(places: list[_Place], pack_blocks: Mapping[str, int]) -> list[tuple[str, int]]:
    used: dict[str, int] = {}
    for place in places:
        content = place.node.content
        if content is None:
            continue
        if not place.node.is_file or len(content.chunks) != -(-content.size >> content.chunkbits):
            raise BadInputError(f"{_path(place)} has content that does not fit its size")
        for chunk in content.chunks:
            if chunk is None:
                continue
            size = used.setdefault(chunk.pack_id, pack_blocks.get(chunk.pack_id, 0))
            if chunk.block + blocks(chunk.length) > size:
                raise BadInputError(f"{_path(place)} has a chunk outside of its pack {chunk.pack_id}")
    if len(used) > erofs.MAX_DEVICES:
        raise BadInputError(f"a tree can use {erofs.MAX_DEVICES} packs; this one uses {len(used)}")
    return list(used.items())


def _check(place: _Place) -> None:
    node = place.node
    kind = stat.S_IFMT(node.mode)
    if kind not in erofs.FILE_TYPES or not 0 <= node.mode <= 0xFFFF:
        raise BadInputError(f"{_path(place)} has mode {node.mode:#o}, no known type of file")
    if not (0 <= node.uid <= _U32 and 0 <= node.gid <= _U32):
        raise BadInputError(f"{_path(place)} has owner {node.uid}:{node.gid}, which is out of range")
    if not (-(1 << 63) <= node.mtime < 1 << 63 and 0 <= node.mtime_ns < 10**9):
        raise BadInputError(f"{_path(place)} has a time that is out of range: {node.mtime} s, {node.mtime_ns} ns")
    if kind == stat.S_IFLNK and (not 0 < len(node.link) <= erofs.LINK_MAX or b"\0" in node.link):
        raise BadInputError(f"{_path(place)} is a symlink to {len(node.link)} bytes; 1 to {erofs.LINK_MAX} are allowed")
    if kind in (stat.S_IFCHR, stat.S_IFBLK) and erofs.decode_device(erofs.encode_device(node.rdev)) != node.rdev:
        raise BadInputError(f"{_path(place)} is device {node.rdev:#x}, whose numbers are out of range")
    if kind != stat.S_IFDIR and node.children:
        raise BadInputError(f"{_path(place)} has children but is no directory")


def _xattr_body(place: _Place, warnings: list[str]) -> bytes:
    if not place.node.xattrs:
        return b""
    body = bytearray(erofs.XATTR_HEADER.pack(0, 0))
    beyond = 0  # said once: there may be a hundred thousand, each with a long path
    for name, value in sorted(place.node.xattrs.items()):
        parts = erofs.xattr_name_parts(name)
        reason = ""
        if parts is None:
            reason = "EROFS cannot hold this kind"
        elif len(name) > erofs.NAME_MAX:
            reason = f"its name is longer than {erofs.NAME_MAX} bytes"
        elif len(value) > erofs.XATTR_VALUE_MAX:
            reason = f"its value is longer than {erofs.XATTR_VALUE_MAX} bytes"
        else:
            entry = erofs.XATTR_ENTRY.pack(len(parts[1]), parts[0], len(value)) + parts[1] + value
            if len(body) + len(entry) + 3 > erofs.XATTR_BODY_MAX:
                beyond += 1
            else:
                body += entry + bytes(-len(entry) % 4)
        if reason:
            shown = name.decode("utf-8", "backslashreplace")
            warnings.append(f"{_path(place)}: extended attribute {shown} left out: {reason}")
    if beyond:
        reason = f"all of them together take more than {erofs.XATTR_BODY_MAX} bytes"
        warnings.append(f"{_path(place)}: {beyond} of its extended attributes left out: {reason}")
    return bytes(body) if len(body) > erofs.XATTR_HEADER.size else b""


def _measure(place: _Place) -> None:
    """Sizes of header, tail and whole blocks, and the layout."""
    node = place.node
    place.header = erofs.INODE.size + len(place.xattrs)
    if node.is_dir:
        place.splits, tail = _split_names(place.names)
        place.full_blocks = len(place.splits) - 1
        place.size = place.full_blocks * BLOCK + tail
    elif node.content is not None and node.content.size:
        place.size, place.layout = node.content.size, erofs.LAYOUT_CHUNKED
        place.header += -place.header % erofs.CHUNK_INDEX.size
        place.tail = len(node.content.chunks) * erofs.CHUNK_INDEX.size
        return
    else:
        place.size = tail = len(node.link)
    if not tail:
        return
    if place.header + tail <= BLOCK:
        place.layout, place.tail = erofs.LAYOUT_INLINE, tail
    else:
        place.full_blocks += 1


def _split_names(names: Sequence[bytes]) -> tuple[list[int], int]:
    """Index of the first name of each directory block, and the bytes used of the last block."""
    splits, used = [0], 0
    for number, name in enumerate(names):
        need = erofs.DIRENT.size + len(name)
        if used + need > BLOCK:
            splits.append(number)
            used = 0
        used += need
    return splits, used


def _align(position: int, place: _Place) -> int:
    position += -position % erofs.SLOT
    together = place.header + place.tail if place.layout == erofs.LAYOUT_INLINE else erofs.INODE.size
    if position % BLOCK + together > BLOCK:
        position += -position % BLOCK
    return position


def write_image(plan: ImagePlan) -> bytes:
    """The bytes of a planned image."""
    image = bytearray(plan.blocks * BLOCK)
    for number, (pack_id, size) in enumerate(plan.packs):
        erofs.DEVICE.pack_into(image, _DEVICES_OFFSET + number * erofs.DEVICE.size, pack_id.encode(), size, 0)
    ordinals = {pack_id: number for number, (pack_id, _) in enumerate(plan.packs, 1)}
    for place in plan.places:
        _emit(image, place, plan.by_node, ordinals)
    _emit_superblock(image, plan, bytes(16))
    _emit_superblock(image, plan, digest(image)[:16])
    return bytes(image)


def _emit(image: bytearray, place: _Place, by_node: dict[int, _Place], ordinals: dict[str, int]) -> None:
    node, start = place.node, place.offset
    union = place.first_block
    kind = stat.S_IFMT(node.mode)
    if kind == stat.S_IFDIR:
        _emit_data(image, place, _directory_blocks(place, by_node))
    elif kind == stat.S_IFLNK:
        _emit_data(image, place, [node.link])
    elif place.layout == erofs.LAYOUT_CHUNKED and node.content is not None:
        union = erofs.CHUNK_INDEXES | node.content.chunkbits - erofs.BLOCK_BITS
        tail = start + place.header
        image[tail : tail + place.tail] = _chunk_indexes(node.content, ordinals)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        union = erofs.encode_device(node.rdev)
    count = (len(place.xattrs) - erofs.XATTR_HEADER.size) // 4 + 1 if place.xattrs else 0
    erofs.INODE.pack_into(
        image, start, erofs.EXTENDED | place.layout << 1, count, node.mode, 0, place.size, union,
        place.nid & _U32, node.uid, node.gid, node.mtime, node.mtime_ns, place.links,
    )  # fmt: skip
    image[start + erofs.INODE.size : start + erofs.INODE.size + len(place.xattrs)] = place.xattrs


def _emit_data(image: bytearray, place: _Place, data: list[bytes]) -> None:
    for number, block in enumerate(data[: place.full_blocks]):
        at = (place.first_block + number) * BLOCK
        image[at : at + len(block)] = block
    if place.layout == erofs.LAYOUT_INLINE:
        at = place.offset + place.header
        image[at : at + place.tail] = data[place.full_blocks]


def _directory_blocks(place: _Place, by_node: dict[int, _Place]) -> list[bytes]:
    children, result = place.node.children, []
    for first, end in zip(place.splits, [*place.splits[1:], len(place.names)], strict=True):
        names = place.names[first:end]
        offset = erofs.DIRENT.size * len(names)
        entries = bytearray()
        for name in names:
            child = children.get(name)
            if child is not None:
                nid, kind = by_node[id(child)].nid, erofs.FILE_TYPES[stat.S_IFMT(child.mode)]
            elif name == _DOTDOT and place.parent is not None:
                nid, kind = place.parent.nid, _DIR_TYPE
            else:
                nid, kind = place.nid, _DIR_TYPE
            entries += erofs.DIRENT.pack(nid, offset, kind, 0)
            offset += len(name)
        result.append(bytes(entries) + b"".join(names))
    return result


def _chunk_indexes(content: FileContent, ordinals: dict[str, int]) -> bytes:
    def index(chunk: Chunk | None) -> bytes:
        if chunk is None:
            return erofs.CHUNK_INDEX.pack(0, 0, erofs.HOLE)
        return erofs.CHUNK_INDEX.pack(0, ordinals[chunk.pack_id], chunk.block)

    return b"".join(map(index, content.chunks))


def _emit_superblock(image: bytearray, plan: ImagePlan, uuid: bytes) -> None:
    incompat = erofs.INCOMPAT_CHUNKED | (erofs.INCOMPAT_DEVICES if plan.packs else 0)
    erofs.SUPERBLOCK.pack_into(
        image, erofs.SUPERBLOCK_OFFSET, erofs.MAGIC, 0, erofs.COMPAT_CHECKSUM | erofs.COMPAT_MTIME,
        erofs.BLOCK_BITS, 0, plan.places[0].nid, len(plan.places), 0, 0, plan.blocks, 0, 0, uuid, b"floe",
        incompat, 0, len(plan.packs), _DEVICES_OFFSET // erofs.DEVICE.size if plan.packs else 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    checksum = erofs.superblock_checksum(image)
    image[erofs.SUPERBLOCK_OFFSET + 4 : erofs.SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
