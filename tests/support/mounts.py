"""A node of its own for each test of mounts: run directory, cache, trees of random files; all unmounted at the end."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.pack_server import PackServer
from support.packs import TestPack, make_pack, random_content
from support.trees import TestPack as Content

from floe.ingest.entries import Chunk, FileContent, Node, chunk_bits, walk
from floe.ingest.erofs_writer import build_image
from floe.mount.mounter import TreeMounter
from floe.mount.mountinfo import mount_at, read_mounts
from floe.mount.syscalls import unmount
from floe.store.cache import NodeCache
from floe.store.ids import hexdigest
from floe.store.trees import LocalTree, TreeStore


class MountNode:
    """`mounters` made with `mounter` share run directory and cache, as processes of one node do."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        self.run.mkdir()
        self.cache = NodeCache(root / "cache")
        self.servers: list[PackServer] = []

    def mounter(self, **settings: Any) -> TreeMounter:
        return TreeMounter(self.run, settings.pop("cache", self.cache), **settings)

    def serve(self) -> PackServer:
        server = PackServer(self.run, self.cache.packs)
        self.servers.append(server)
        return server

    def pin(self, tree: LocalTree) -> set[str]:
        """The pins each pack of a tree has that is mounted natively."""
        return {self.mounter().pins.owner(tree.digest)}

    def pack(self, content: bytes, *, complete: bool = True, cache: NodeCache | None = None) -> TestPack:
        """Put a pack into the cache; its data too even if it is not `complete`, for PackServer to serve."""
        cache = cache or self.cache
        pack = make_pack(content)
        cache.add_index(pack.id, pack.index.encode())
        cache.data_path(pack.id).write_bytes(content)
        if complete:
            (cache.folder(pack.id) / "complete").touch()
        return pack

    def tree(
        self, name: str = "tree", *, packs: int = 1, size: int = 1 << 20, complete: bool = True, cache: Any = None
    ) -> LocalTree:
        """A tree of `packs` files `file0`, ..., each `size` bytes in a pack of its own, and a text file `name`."""
        cache = cache or self.cache
        root = Node(stat.S_IFDIR | 0o755, mtime=1)
        root.children[b"name"] = Node(stat.S_IFLNK | 0o777, link=name.encode())
        blocks = {}
        for number in range(packs):
            pack = self.pack(content_of(name, number, size), complete=complete, cache=cache)
            blocks[pack.id] = len(pack.content) // 4096
            step = 1 << chunk_bits(size)
            chunks = tuple(
                Chunk(b"", min(step, size - start), pack.id, start // 4096) for start in range(0, size, step)
            )
            root.children[b"file%d" % number] = Node(
                stat.S_IFREG | 0o4755, content=FileContent(size, chunk_bits(size), chunks)
            )
        root.children[b"null"] = Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
        image = build_image(root, blocks)
        cache.add_tree(hexdigest(image), image)
        tree = TreeStore(NoStore(), cache).fetch_local(hexdigest(image))  # type: ignore[arg-type]
        assert tree is not None
        return tree

    def install(self, root: Node, packs: list[Content], *, complete: bool = True) -> LocalTree:
        """A tree of `root`, whose chunks lie in `packs` of hand; they become packs of the cache."""
        ids = {pack.id: self.pack(bytes(pack.data), complete=complete).id for pack in packs if pack.data}
        seen = set()
        for _, found in walk(root):
            for chunk in found.content.chunks if found.content else ():
                if chunk is not None and id(chunk) not in seen:
                    seen.add(id(chunk))
                    chunk.pack_id = ids[chunk.pack_id]
        image = build_image(root, {ids[pack.id]: pack.blocks for pack in packs if pack.data})
        self.cache.add_tree(hexdigest(image), image)
        tree = TreeStore(NoStore(), self.cache).fetch_local(hexdigest(image))  # type: ignore[arg-type]
        assert tree is not None
        return tree

    def close(self) -> None:
        """End the servers, which aborts their connections, then unmount whatever lies below the root."""
        for server in self.servers:
            server.kill()
        for entry in reversed(read_mounts()):
            if entry.target.startswith(f"{self.root}/"):
                with contextlib.suppress(OSError):
                    unmount(entry.target, detach=True)


class NoStore:
    url = "none:"


def content_of(name: str, number: int, size: int) -> bytes:
    return random_content(size, seed=hash_of(f"{name} {number}"))


def hash_of(text: str) -> int:
    return int(hexdigest(text.encode())[:8], 16)


def entry_at(path: Path):
    return mount_at(os.path.realpath(path), read_mounts())


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Poll, at most `seconds`, for what no event tells."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def mount_node(root: Path) -> Iterator[MountNode]:
    node = MountNode(root)
    try:
        yield node
    finally:
        node.close()
