"""Blocks: on page boundaries, and used again only when nobody can see them."""

import ctypes
import mmap

import pytest

from floe.store import blocks
from floe.store.blocks import Blocks


def address(view):
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


@pytest.mark.parametrize("size", [1, 4096, 12288, 1 << 20])
def test_a_block_has_its_size_and_begins_with_a_page(size):
    block = Blocks().take(size)
    assert len(block) == size
    assert address(block) % mmap.PAGESIZE == 0
    block[:] = b"x" * size


def test_a_block_is_used_again_when_its_last_view_is_gone():
    pool = Blocks()
    first = pool.take(8192)
    first[:] = b"a" * 8192
    slice_of_it = first[100:200].toreadonly()
    del first
    other = pool.take(8192)
    other[:] = b"b" * 8192
    assert bytes(slice_of_it) == b"a" * 100
    where = address(other)
    del other
    again = pool.take(8192)
    assert address(again) == where
    third = pool.take(8192)
    assert address(third) != where
    assert bytes(slice_of_it) == b"a" * 100


def test_little_memory_lies_unused(monkeypatch):
    monkeypatch.setattr(blocks, "_SPARE", 3 * 8192)
    pool = Blocks()
    many = [pool.take(size) for _ in range(10) for size in (4096, 8192, 12288, 1 << 20)]
    del many
    assert 0 < pool.spare() < (1 << 20) + 3 * 8192
