"""Trees for tests: nodes with content in hand-made packs, and what can be compared of a tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from floe.ingest.entries import Chunk, FileContent, Node, chunk_bits, link_counts, walk
from floe.store import layout
from floe.store.erofs_reader import read_image
from floe.store.frames import decode_frame
from floe.store.ids import digest, hexdigest
from floe.store.packindex import BLOCK, PackIndex
from floe.store.treeobject import decode_tree


@dataclass
class TestPack:
    """Content laid out the way packs are, without frames: bytes and a made-up id."""

    __test__ = False
    name: str
    data: bytearray = field(default_factory=bytearray)

    @property
    def id(self) -> str:
        return hexdigest(self.name.encode())

    @property
    def blocks(self) -> int:
        return len(self.data) // BLOCK

    def add(self, content: bytes) -> Chunk:
        block = self.blocks
        self.data += content + bytes(-len(content) % BLOCK)
        return Chunk(digest(content), len(content), self.id, block)


def file_node(pack: TestPack, content: bytes, mode: int = 0o644, **attributes: object) -> Node:
    """A regular file whose chunks are in `pack`, all-zero chunks as holes."""
    node = Node(stat.S_IFREG | mode, **attributes)  # type: ignore[arg-type]
    if content:
        bits = chunk_bits(len(content))
        pieces = [content[i : i + (1 << bits)] for i in range(0, len(content), 1 << bits)]
        chunks = tuple(pack.add(piece) if any(piece) else None for piece in pieces)
        node.content = FileContent(len(content), bits, chunks)
    return node


def content_of(node: Node, packs: Mapping[str, bytes | bytearray]) -> bytes:
    """A regular file's bytes, read through its chunks."""
    content = node.content
    if content is None:
        return b""
    out = bytearray()
    for number, chunk in enumerate(content.chunks):
        length = min(1 << content.chunkbits, content.size - (number << content.chunkbits))
        start = 0 if chunk is None else chunk.block * BLOCK
        out += bytes(length) if chunk is None else packs[chunk.pack_id][start : start + length]
    return bytes(out)


Facts = tuple[object, ...]


def read_packs(catalog, manifest) -> dict[str, bytes]:
    """The content of a manifest's packs, every frame checked."""
    packs = {}
    for entry in manifest.packs:
        index = PackIndex.decode(catalog.store.get(layout.pack_index_key(entry.id)), entry.id)
        data = bytes(catalog.store.get(layout.pack_key(entry.id)))
        content = bytearray()
        for number, frame in enumerate(index.frames):
            start = index.stored_offsets[number]
            content += decode_frame(data[start : start + frame.stored], frame, index.content_length(number)).content
        packs[entry.id] = bytes(content)
    return packs


def read_tree(catalog, digest) -> Node:
    """A tree of the store as nodes."""
    return read_image(decode_tree(catalog.store.get(layout.tree_key(digest)), digest))


def node_facts(root: Node, packs: Mapping[str, bytes | bytearray]) -> dict[bytes, Facts]:
    """Path -> everything stat, readlink, listxattr and read show of a node."""
    links = link_counts(root)
    return {
        path: (
            node.mode, node.uid, node.gid, node.mtime * 10**9 + node.mtime_ns, links[id(node)],
            node.rdev if stat.S_ISBLK(node.mode) or stat.S_ISCHR(node.mode) else 0, node.link,
            dict(sorted(node.xattrs.items())), digest(content_of(node, packs)) if node.is_file else b"",
            node.size if node.is_file else 0,
        )
        for path, node in walk(root)
    }  # fmt: skip


def disk_facts(root: Path, *, without: bytes = b"") -> dict[bytes, Facts]:
    """The same of a directory on disk, except for the entry `without`."""
    facts: dict[bytes, Facts] = {}
    pending = [root]
    while pending:
        here = pending.pop()
        path = b"" if here == root else os.fsencode(here.relative_to(root))
        if without and path == without:
            continue
        found = here.lstat()
        mode = found.st_mode
        names = os.listxattr(here, follow_symlinks=False)
        xattrs = {os.fsencode(name): os.getxattr(here, name, follow_symlinks=False) for name in names}
        if stat.S_ISDIR(mode):
            pending.extend(here.iterdir())
        facts[path] = (
            mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_nlink,
            found.st_rdev if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else 0,
            os.readlink(os.fsencode(here)) if stat.S_ISLNK(mode) else b"",  # noqa: PTH115 - Path would normalize it
            dict(sorted(xattrs.items())), digest(here.read_bytes()) if stat.S_ISREG(mode) else b"",
            found.st_size if stat.S_ISREG(mode) else 0,
        )  # fmt: skip
    return facts
