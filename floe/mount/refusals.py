"""What the kernel says when it will not mount, in Floe's errors."""

from __future__ import annotations

import errno

from floe.mount.runner import OperationError
from floe.store.errors import (
    AccessDeniedError,
    BusyError,
    DamagedError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)

_KINDS: dict[int, tuple[type[FloeError], str]] = {
    errno.EPERM: (AccessDeniedError, "mounting needs root (CAP_SYS_ADMIN)"),
    errno.EACCES: (AccessDeniedError, "mounting needs root (CAP_SYS_ADMIN)"),
    errno.EBUSY: (BusyError, "something else is mounted or being mounted there"),
    errno.ENODEV: (UnsupportedError, 'load the module `erofs`, or allow the portable mount (mounter = "auto")'),
    errno.ENOPKG: (UnsupportedError, "pyfuse3 is missing: pip install '.[portable]' in a checkout of Floe; it needs libfuse3-dev"),
    errno.ENXIO: (UnsupportedError, "this kernel has no FUSE: load the module `fuse`"),
    errno.ENOSYS: (UnsupportedError, "use Linux 5.16 or later"),
    errno.ENOTBLK: (UnsupportedError, 'allow loop devices (loop = "auto"), or put the cache on a local disk'),
    errno.EOPNOTSUPP: (UnsupportedError, "use a newer kernel"),
    errno.ENOENT: (NotFoundError, "start the pack filesystem again if it does not know the pack, or fetch the tree again"),
    errno.ENOTDIR: (NotFoundError, "give a directory"),
    errno.EINVAL: (DamagedError, "the kernel log (dmesg) may say more; push its model or index its image again"),
    errno.EUCLEAN: (DamagedError, "push its model or index its image again"),
    errno.EBADMSG: (DamagedError, "push its model or index its image again"),
    errno.ENOSPC: (NoSpaceError, "too many mounts: see /proc/sys/fs/mount-max"),
    errno.ENOMEM: (UnavailableError, "free some memory, then try again"),
    errno.ENOTCONN: (UnavailableError, "start the pack filesystem again with `floe packfs`"),
}  # fmt: skip


def refusal(error: OperationError, what: str) -> FloeError:
    """The error to raise for `what`, with the failed step and the kernel's words in it."""
    kind, hint = _KINDS.get(error.errno or 0, (UnavailableError, "the kernel log (dmesg) may say more"))
    return kind(f"{what}: {error}", hint=error.hint or hint)
