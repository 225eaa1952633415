"""Bytes from one file to another without passing through this process, where the kernel and the file system can."""

from __future__ import annotations

import errno
import os

_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def copy_range(source: int, start: int, target: int, to: int, size: int) -> int:
    """Copy up to `size` bytes from `start` of the open file `source` to `to` of `target`.

    Returns how many; 0: `source` ends at `start`. Blocks are shared where the file system can.
    """
    try:
        return os.copy_file_range(source, target, size, start, to)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return os.pwrite(target, os.pread(source, size, start), to)
