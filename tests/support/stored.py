"""What a reader gets out of a store: files and their content, every frame verified, every reference followed."""

from __future__ import annotations

from floe.store import layout
from floe.store.erofs_reader import read_image
from floe.store.frames import decode_frame
from floe.store.packindex import BLOCK, PackIndex
from floe.store.treeobject import decode_tree


def pack_content(store, pack_id):
    """All content of a stored pack."""
    index = PackIndex.decode(store.get(layout.pack_index_key(pack_id)), pack_id)
    data, offsets = bytes(store.get(layout.pack_key(pack_id))), index.stored_offsets
    frames = zip(index.frames, offsets, offsets[1:], strict=False)
    return b"".join(
        bytes(decode_frame(data[start:stop], frame, index.content_length(number)).content)
        for number, (frame, start, stop) in enumerate(frames)
    )


def tree_files(store, tree):
    """The regular files of a stored tree: path -> content."""
    packs, found = {}, {}

    def chunk(one):
        if one.pack_id not in packs:
            packs[one.pack_id] = pack_content(store, one.pack_id)
        return packs[one.pack_id][one.block * BLOCK : one.block * BLOCK + one.length]

    def visit(path, node):
        for name, child in node.children.items():
            visit(f"{path}/{name.decode()}" if path else name.decode(), child)
        if node.is_file:
            chunks = node.content.chunks if node.content else ()
            found[path] = b"".join(chunk(one) for one in chunks)

    visit("", read_image(decode_tree(store.get(layout.tree_key(tree)), tree)))
    return found
