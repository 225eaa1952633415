"""POSIX ACLs as xattr values. Pure. Source: the kernel's include/uapi/linux/posix_acl_xattr.h and fs/posix_acl.c."""

from __future__ import annotations

import struct

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"

_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # tag, permissions, user or group
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_ORDER = (_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER)


def parse(value: bytes) -> list[tuple[int, int, int]] | None:
    """The (tag, permissions, id) entries; None when the kernel would refuse the value."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        return None
    if _HEADER.unpack_from(value)[0] != _VERSION:
        return None
    entries = list(_ENTRY.iter_unpack(value[_HEADER.size :]))
    tags = [tag for tag, _, _ in entries]
    if not entries:
        return entries
    if any(tag not in _ORDER or permissions > 7 for tag, permissions, _ in entries) or tags != sorted(tags):
        return None
    if any(tags.count(tag) != 1 for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER)) or tags.count(_MASK) > 1:
        return None
    if (_USER in tags or _GROUP in tags) and _MASK not in tags:
        return None
    return entries


def fit(value: bytes, mode: int) -> bytes | None:
    """The access ACL after `chmod mode`, which an unpacker does last; None when nothing is left beyond the mode.

    ValueError when it is no ACL.
    """
    entries = parse(value)
    if entries is None:
        raise ValueError("not a POSIX ACL")
    tags = {tag for tag, _, _ in entries}
    if tags <= {_USER_OBJ, _GROUP_OBJ, _OTHER}:
        return None
    bits = {_USER_OBJ: mode >> 6 & 7, _MASK: mode >> 3 & 7, _OTHER: mode & 7}
    if _MASK not in tags:
        bits[_GROUP_OBJ] = mode >> 3 & 7
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(tag, bits.get(tag, perm), who) for tag, perm, who in entries)
