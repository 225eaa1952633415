"""Frames: only content that matches its digest becomes one."""

import pytest
import zstandard
from support.packs import make_pack, random_content

from floe.store.errors import TransitDamageError
from floe.store.frames import FrameTable, VerifiedFrame, decode_frame, encode_frame, encode_frames
from floe.store.ids import digest
from floe.store.packindex import CODEC_RAW, CODEC_ZSTD, FrameEntry


@pytest.mark.parametrize(("compressible", "codec"), [(False, CODEC_RAW), (True, CODEC_ZSTD)])
def test_a_frame_comes_back(compressible, codec):
    content = random_content(1 << 17, compressible=compressible)
    stored, entry = encode_frame(content)
    assert (entry.codec, entry.stored, entry.digest) == (codec, len(stored), digest(content))
    assert bytes(decode_frame(stored, entry, len(content)).content) == content


def test_frames_encoded_together_have_the_bytes_they_have_alone():
    contents = [random_content(size, compressible=size % 3 > 0) for size in (4096, 1 << 17, 1 << 17, 12288)]
    alone = [zstandard.ZstdCompressor(level=3).compress(content) for content in contents]
    together = encode_frames([memoryview(content) for content in contents])
    for content, packed, (stored, entry) in zip(contents, alone, together, strict=True):
        assert bytes(stored) == (packed if entry.codec == CODEC_ZSTD else content)
        assert entry.digest == digest(content)
    assert {entry.codec for _, entry in together} == {CODEC_RAW, CODEC_ZSTD}


@pytest.mark.parametrize("compressible", [False, True])
def test_any_flipped_byte_or_missing_end_is_noticed(compressible):
    content = random_content(4096, compressible=compressible)
    stored, entry = encode_frame(content)
    for at in range(0, len(stored), 7):
        damaged = bytearray(stored)
        damaged[at] ^= 0x10
        try:
            frame = decode_frame(damaged, entry, len(content))
        except TransitDamageError:
            continue
        assert bytes(frame.content) == content  # a bit of the zstd header that changes nothing
    for wrong in (stored[:-1], b"", bytes(stored) + b"x"):
        with pytest.raises(TransitDamageError):
            decode_frame(wrong, entry, len(content))


def test_a_zstd_header_that_asks_for_much_memory_is_refused():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(TransitDamageError):
        decode_frame(bomb, FrameEntry(len(bomb), CODEC_ZSTD, digest(bytes(1 << 26))), 1 << 17)


def test_there_is_no_frame_without_its_digest():
    with pytest.raises(TransitDamageError):
        VerifiedFrame(b"content", digest(b"another"))


@pytest.mark.parametrize("compressible", [False, True])
def test_the_table_says_what_the_index_says(compressible):
    pack = make_pack(random_content((1 << 20) + 4096, 5, compressible=compressible))
    table, index = FrameTable(pack.index), pack.index
    assert (len(table), table.content_size, table.frame_size) == (9, index.content_size, index.frame_size)
    for number, entry in enumerate(index.frames):
        assert table.entry(number) == entry
        assert table.content_length(number) == index.content_length(number)
        assert table.stored_range(number) == (index.stored_offsets[number], entry.stored)
        extra = entry.stored if entry.codec == CODEC_ZSTD else 0
        assert table.memory(number) == index.content_length(number) + extra
    assert table.stored_range(2, 7) == (index.stored_offsets[2], index.stored_size - index.stored_offsets[2])
