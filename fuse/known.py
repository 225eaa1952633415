"""packs.known: which packs the kernel has met since the mount, so that every later worker knows them too.

A text file in the run directory, one line a pack: `<pack id> <content bytes>`, appended before the kernel
learns the node id. The kernel never repeats a LOOKUP or OPEN to a worker's successor.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from floe.fuse import protocol
from floe.store.ids import is_hexdigest

FILE_NAME = "packs.known"


class NodeCollisionError(Exception):
    """Two packs with the same node id, or an id that names the root or nothing: such a pack cannot be served."""


class KnownPacks:
    """Node id to (pack id, size in bytes). Reading needs no lock; adding takes one."""

    def __init__(self, run_dir: Path) -> None:
        self._fd = os.open(run_dir / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self._by_node: dict[int, tuple[str, int]] = {}
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        for line in data.decode("ascii", "replace").splitlines(keepends=True):
            pack_id, _, size = line.strip().partition(" ")
            if line.endswith("\n") and is_hexdigest(pack_id) and size.isdigit():
                self._by_node[protocol.node_id(pack_id)] = (pack_id, int(size))
        if data and not data.endswith(b"\n"):
            os.write(self._fd, b"\n")

    def get(self, node: int) -> tuple[str, int] | None:
        """The pack behind a node id, or None."""
        return self._by_node.get(node)

    def __len__(self) -> int:
        return len(self._by_node)

    def entries(self) -> list[tuple[int, bytes]]:
        """(node id, name) of all, in the order of their meeting."""
        with self._lock:
            return [(node, pack_id.encode()) for node, (pack_id, _) in self._by_node.items()]

    def add(self, pack_id: str, size: int) -> int:
        """Record the pack durably, in so far as the mount is, and return its node id."""
        node = protocol.node_id(pack_id)
        with self._lock:
            known = self._by_node.get(node)
            if node <= protocol.ROOT_NODE or (known is not None and known[0] != pack_id):
                raise NodeCollisionError(pack_id)
            if known is None:
                os.write(self._fd, f"{pack_id} {size}\n".encode())
                self._by_node[node] = (pack_id, size)
        return node

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
