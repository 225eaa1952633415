"""Content of all sizes, put together and encoded by tasks of a pool, is in the frames it belongs to."""

import random
from concurrent.futures import ThreadPoolExecutor

from floe.ingest.packwriter import PackWriter
from floe.ingest.spool import Room, Spool
from floe.store.ids import digest
from floe.store.nodes import CHUNK, Chunk
from floe.store.packindex import LAYER_FRAME


def _packs(folder, datas):
    sealed = []
    room = Room()
    with ThreadPoolExecutor(2) as pool, Spool(folder, room) as spool:

        def take(pack):
            sealed.append(pack)
            spool.give_back(pack.index.content_size)

        writer = PackWriter(spool, LAYER_FRAME, pool, take)
        for data in datas:
            writer.add(Chunk(digest(data), len(data)), data)
        writer.seal()
        assert room._left == room._total
    return sealed


def test_frames_hold_the_chunks_whatever_their_sizes(tmp_path):
    made = random.Random(3)
    sizes = [1, 4095, 4096, 4097, CHUNK - 1, 3_000_001, CHUNK, 2_500_000, 70_000, CHUNK - 4096, 9]
    datas = [made.randbytes(size) for size in sizes]
    (pack,), again = _packs(tmp_path, datas), _packs(tmp_path, datas)
    assert pack.id == again[0].id
    whole = [data for data in datas if len(data) == CHUNK] + [data for data in datas if len(data) != CHUNK]
    content = b"".join(data + bytes(-len(data) % 4096) for data in whole)
    assert pack.index.content_size == len(content)
    for number, frame in enumerate(pack.index.frames):
        assert frame.digest == digest(content[number * LAYER_FRAME : (number + 1) * LAYER_FRAME])
    for entry in pack.chunks:
        assert digest(content[entry.block * 4096 :][: entry.length]) == entry.digest
