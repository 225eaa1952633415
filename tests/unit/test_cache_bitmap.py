"""The bits of a pack and their file."""

import pytest

from floe.store.cache.bitmap import HEADER_BYTES, Bitmap, runs

BOOT = "01234567-89ab-cdef-0123-456789abcdef"
FRAME = 4096


def bitmap(count: int, short: int = 0) -> Bitmap:
    return Bitmap(FRAME * 2, count * FRAME * 2 - short, BOOT)


def test_a_file_says_what_was_written():
    bits = bitmap(19, FRAME)
    for frame in (0, 7, 8, 18):
        bits.trust(frame)
    bits.suspect[1] |= 2
    bits.clean = True
    found = Bitmap.decode(bits.encode())
    assert found is not None
    assert (found.trusted, found.suspect) == (bits.trusted, bits.suspect)
    assert (found.clean, found.boot_id, found.frame_size, found.content_size) == (True, BOOT, FRAME * 2, 37 * FRAME)
    assert len(bits.encode()) == HEADER_BYTES + 6


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65])
def test_covers_is_all_of_a_range(count):
    bits = bitmap(count)
    bits.fill()
    assert bits.is_full()
    for gone in range(count):
        bits.clear(gone)
        assert not bits.is_full()
        for first in range(count):
            for last in range(first, count):
                assert bits.covers(first, last) == (not first <= gone <= last)
        bits.trust(gone)


def test_distrusted_frames_are_present_but_not_trusted():
    bits = bitmap(10)
    bits.trust(3)
    bits.distrust()
    assert (bits.is_trusted(3), bits.is_suspect(3), bits.present()) == (False, True, [3])
    bits.trust(9)
    bits.distrust()
    assert bits.present() == [3, 9]
    bits.trust(3)
    assert (bits.is_trusted(3), bits.is_suspect(3)) == (True, False)


def test_held_counts_content_not_frames():
    bits = bitmap(3, FRAME)
    assert bits.held() == 0
    bits.fill()
    assert bits.held() == 5 * FRAME
    bits.clear(2)
    assert bits.held() == 4 * FRAME


@pytest.mark.parametrize("cut", [0, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 3])
def test_a_part_of_a_file_is_no_bitmap(cut):
    assert Bitmap.decode(bitmap(10).encode()[:cut]) is None


@pytest.mark.parametrize(("at", "value"), [(0, 0), (8, 9), (10, 2), (13, 0xFF), (16, 1), (HEADER_BYTES + 1, 0x80)])
def test_a_damaged_file_is_no_bitmap(at, value):
    data = bytearray(bitmap(10).encode())
    data[at] = value
    assert Bitmap.decode(bytes(data)) is None


def test_runs():
    assert runs([]) == []
    assert runs([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 1), (9, 2)]
