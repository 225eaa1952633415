"""Large frames are compressed only when samples of them promise something."""

import random

import pytest

from floe.store.frames import decode_frame, encode_frames
from floe.store.packindex import CODEC_RAW, CODEC_ZSTD

SIZE = 1 << 20
NOISE = random.Random(1).randbytes(SIZE)


def test_each_frame_is_decided_for_itself_and_comes_back_in_order():
    contents = [NOISE, b"text " * (SIZE // 5), NOISE[: SIZE // 2] + bytes(SIZE // 2), NOISE[:5000], b"a" * 5000]
    encoded = encode_frames(contents)
    codecs = [entry.codec for _, entry in encoded]
    assert codecs == [CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD, CODEC_RAW, CODEC_ZSTD]
    for content, (stored, entry) in zip(contents, encoded, strict=True):
        assert bytes(decode_frame(bytes(stored), entry, len(content)).content) == content


@pytest.mark.parametrize("zeros", [0, 1])
def test_half_zeros_are_found_wherever_they_are(zeros):
    halves = [NOISE[: SIZE // 2]] * 2
    halves[zeros] = bytes(SIZE // 2)
    ((stored, entry),) = encode_frames([b"".join(halves)])
    assert entry.codec == CODEC_ZSTD
    assert len(stored) < SIZE * 6 // 10
