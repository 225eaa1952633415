"""The kernel's structures, byte by byte, against include/uapi/linux/fuse.h."""

import struct

from floe.fuse import protocol as p


def test_sizes_are_the_kernel_s():
    assert (p.IN_BYTES, p.OUT_BYTES, p.READ_IN.size) == (40, 16, 40)
    assert len(p.init_reply(38, p.WANTED)) == 64
    assert len(p.entry_reply(5, 4096)) == 40 + 88
    assert len(p.attr_reply(1, 0)) == 16 + 88
    assert (len(p.open_reply()), len(p.statfs_reply())) == (16, 80)


def test_init_grants_only_what_is_offered_and_wanted():
    offered = p.ASYNC_DIO | p.MAX_PAGES | 1 << 12
    major, minor, _, flags = struct.unpack_from("<4I", p.init_reply(31, offered))
    assert (major, minor, flags) == (7, 31, p.ASYNC_DIO | p.MAX_PAGES)
    background, congestion = struct.unpack_from("<2H", p.init_reply(31, offered), 16)
    assert (background, congestion) == (4096, 3072)
    (pages,) = struct.unpack_from("<H", p.init_reply(31, offered), 28)
    assert pages == 256
    assert struct.unpack_from("<2I", p.init_reply(99, offered)) == (7, p.MINOR)


def test_header_carries_negative_errno_and_unique_with_bit_63():
    assert struct.unpack("<IiQ", p.header(0, 1 << 63 | 8, 5)) == (16, -5, 1 << 63 | 8)
    assert struct.unpack("<IiQ", p.header(100, 8)) == (116, 0, 8)


def test_name_ends_at_its_zero():
    assert p.name(memoryview(b"abc\0rest\0")) == b"abc"


def test_node_id_is_the_pack_id_s_first_eight_bytes():
    assert p.node_id("0123456789abcdef" + "f" * 48) == 0x0123456789ABCDEF


def test_readdir_pages_meet_and_fit():
    entries = [(n + 10, b"%064x" % n) for n in range(20)]
    seen, offset = [], 0
    while block := p.readdir_reply(entries, offset, 300):
        assert len(block) <= 300
        at = 0
        while at < len(block):
            _, offset, length, _ = struct.unpack_from("<QQII", block, at)
            seen.append(block[at + 24 : at + 24 + length])
            at += -(-(24 + length) // 8) * 8
    assert seen == [b".", b"..", *(name for _, name in entries)]
