"""Which files of a tree lie at places of its packs: what a read of a pack was for, as people name it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from floe.store.erofs_inodes import Inodes
from floe.store.profilepaths import files

_FILES_MAX = 64  # of one place: a frame may hold more small files than anybody reads


def files_at(
    image: Inodes, places: Sequence[tuple[str, int, int]], pause: Callable[[], object] = lambda: None
) -> list[list[bytes]]:
    """For each of `places` (pack id, offset, length of content) the files that have content there, the earliest place first.

    Looks at every inode once; `pause` is called now and then. A file of several names counts for the first of them. FloeError: the
    image is damaged.
    """
    by_pack: dict[str, list[tuple[int, int, int]]] = {}
    for number, (pack_id, offset, length) in enumerate(places):
        by_pack.setdefault(pack_id, []).append((offset, offset + length, number))
    for one in by_pack.values():
        one.sort()
    longest = max((length for _, _, length in places), default=0)
    found: list[list[tuple[int, bytes]]] = [[] for _ in places]
    packs = {pack_id for pack_id, _ in image.packs}
    if packs.isdisjoint(by_pack):
        return [[] for _ in places]
    for path, inode in files(image, pause):
        if not inode.size:
            continue
        bits = image.chunk_bits(inode)
        for chunk in image.chunks(inode, 0, -(-inode.size >> bits)):
            wanted = by_pack.get(chunk.pack or "")
            if not wanted:
                continue
            end = chunk.offset + chunk.length
            for at in range(bisect_left(wanted, (chunk.offset - longest,)), bisect_left(wanted, (end,))):
                _, stop, number = wanted[at]
                if chunk.offset < stop:
                    found[number].append((chunk.offset, path))
    return [list(dict.fromkeys(path for _, path in sorted(one)))[:_FILES_MAX] for one in found]
