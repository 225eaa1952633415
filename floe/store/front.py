"""The content of a tree from the front on, for fetching what nobody recorded: as models are loaded. Pure.

First come files of one chunk, which describe the others and are wanted whole, then large ones; each kind in the order of
paths, which is how weights in several shards are numbered and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from floe.store.erofs_inodes import Extent, Inodes
from floe.store.nodes import CHUNK
from floe.store.profilepaths import files

_AT_ONCE = 64  # chunks of a file looked up at a time


def from_front(image: Inodes, pause: Callable[[], object] = lambda: None) -> Iterator[Extent]:
    """Where the tree's content lies, in that order, without holes. `pause` is called now and then.

    Looks at every inode before the first answer, some 5 microseconds each. Content under several names comes again.
    """
    found = [(inode.size > CHUNK, path, inode) for path, inode in files(image, pause) if inode.size]
    for _, _, inode in sorted(found, key=lambda item: item[:2]):
        for start in range(0, inode.size, _AT_ONCE * CHUNK):
            extents = image.extents(inode, start, _AT_ONCE * CHUNK)
            yield from (extent for extent in extents if extent.pack is not None)
