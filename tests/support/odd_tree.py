"""One tree with every kind of entry, attribute and file layout that an image can hold."""

from __future__ import annotations

import os
import random
import stat
import struct

from support.trees import TestPack, file_node

from floe.ingest.entries import FileContent, Node

DIR, REG, LNK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
# Version 2 ACL: user::rw-, user:1000:rwx, group::r--, mask::rwx, other::---  (include/uapi/linux/posix_acl_xattr.h)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permission, who)
    for tag, permission, who in (
        (1, 6, 0xFFFFFFFF),
        (2, 7, 1000),
        (4, 4, 0xFFFFFFFF),
        (16, 7, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    )
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep


def odd_tree(full: TestPack, small: TestPack) -> Node:
    random.seed(7)  # the same tree each time
    root = Node(DIR, mtime=1_700_000_000, mtime_ns=1)

    def put(name: bytes, node: Node, where: Node = root) -> Node:
        where.children[name] = node
        return node

    put(b"empty", Node(REG))
    put(b"one byte", file_node(small, b"x", mtime=5, mtime_ns=999_999_999))
    put(b"block", file_node(small, random.randbytes(4096)))
    put(b"odd", file_node(small, random.randbytes(12345)))
    put(b"just 4 MiB", file_node(small, random.randbytes(4 << 20)))
    put(b"4 MiB and one", file_node(full, random.randbytes((4 << 20) + 1)))
    body = random.randbytes(10 << 20)
    big = put(b"big", file_node(full, body))
    put(b"zeros", file_node(small, bytes(100_000)))
    put(b"sparse", file_node(full, bytes(8 << 20) + b"end"))
    put(b"vast", Node(REG, content=FileContent(1 << 40, 22, (None,) * (1 << 18))))
    # A tail stored in another pack than the full chunks before it.
    assert big.content is not None
    tail = small.add(body[8 << 20 :])
    put(b"split", Node(REG, content=FileContent(10 << 20, 22, (*big.content.chunks[:2], tail))))
    put(b"setuid", file_node(small, b"su", 0o4755))
    put(b"setgid", file_node(small, b"sg", 0o2755))
    put(b"sticky", Node(stat.S_IFDIR | 0o1777))
    put(b"owner", Node(REG, uid=0xFFFFFFFE, gid=4_000_000_000))
    put(b"old", Node(REG, mtime=-1, mtime_ns=500_000_000))
    put(b"older", Node(REG, mtime=-(1 << 35), mtime_ns=7))
    put(b"future", Node(REG, mtime=1 << 35, mtime_ns=123_456_789))
    put(b"\xff\xfe raw", Node(REG))
    put("ünïcødé ☃".encode(), Node(REG))
    put(b"n" * 255, Node(REG))
    put(b"new\nline", Node(REG))
    put(b"!", Node(REG))  # sorts before "." and ".."
    put(b"link", Node(LNK, link=b"big"))
    put(b"dangling", Node(LNK, link=b"../\xff/nowhere"))
    put(b"long link", Node(LNK, link=b"l" * 4095))
    put(b"edge link", Node(LNK, link=b"l" * 4032))
    put(b"over edge link", Node(LNK, link=b"l" * 4033))
    put(b"fifo", Node(stat.S_IFIFO | 0o600))
    put(b"socket", Node(stat.S_IFSOCK | 0o700))
    put(b"char", Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)))
    put(b"block device", Node(stat.S_IFBLK | 0o660, rdev=os.makedev(4095, 0xFFFFF)))
    put(b"whiteout", Node(stat.S_IFCHR, rdev=0))
    put(b"opaque", Node(DIR, xattrs={b"trusted.overlay.opaque": b"y"}))
    put(b"user opaque", Node(DIR, xattrs={b"user.overlay.opaque": b"y"}))
    put(
        b"attributes",
        file_node(small, b"a", xattrs={b"user.a": b"", b"user.b": bytes(range(256)), b"user." + b"k" * 250: b"v"}),
    )
    put(
        b"large attributes", file_node(small, b"b", xattrs={f"user.{i}".encode(): bytes([i]) * 9000 for i in range(20)})
    )
    put(b"capability", file_node(small, b"c", 0o755, xattrs={b"security.capability": CAPABILITY}))
    put(b"acl", file_node(small, b"d", 0o670, xattrs={b"system.posix_acl_access": ACL}))
    put(b"acl dir", Node(stat.S_IFDIR | 0o775, xattrs={b"system.posix_acl_default": ACL, b"user.more": b"1"}))
    put(b"link with attributes", Node(LNK, link=b"t" * 3000, xattrs={b"trusted.x": b"z" * 2000}))
    hard = put(b"hard1", file_node(small, b"hard"))
    put(b"hard3", hard, put(b"sub", Node(DIR)))
    put(b"hard2", hard)
    put(b"hard fifo", root.children[b"fifo"])
    deep = root
    for _ in range(60):
        deep = put(b"d" * 60, Node(DIR), deep)
    put(b"bottom", file_node(small, b"bottom"), deep)
    for count in (1, 130, 300, 3000):
        many = put(b"many%d" % count, Node(DIR))
        for number in range(count):
            put(b"%d-" % number + b"e" * (number % 40), Node(REG, mtime=number), many)
    wide = put(b"subdirs", Node(DIR))
    for number in range(70):
        put(b"%d" % number, Node(DIR), wide)
    return root
