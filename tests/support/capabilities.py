"""Root without root's right to read everything, for tests of files that may not be read."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def ordinary_file_access() -> Iterator[None]:
    """Within it, permission bits count for this thread, whoever it runs as."""
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # effective, permitted, inheritable; twice, for capabilities above 31
    data = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    before = data[0]
    data[0] = before & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        data[0] = before
        if _libc.capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")
