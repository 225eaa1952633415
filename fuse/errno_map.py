"""Which errno a reader sees for each of Floe's errors: the whole table. docs/SEMANTICS.md prints it.

Through a tree every one of them arrives as EIO (EROFS knows no other); on a pack file itself, as here.
"""

from __future__ import annotations

import errno

from floe.store import errors

ERRNO: dict[type[errors.FloeError], int] = {
    errors.FloeError: errno.EIO,
    errors.BadInputError: errno.EINVAL,
    errors.NotFoundError: errno.ENOENT,
    errors.StoreMissingError: errno.ENOENT,
    errors.AlreadyExistsError: errno.EEXIST,
    errors.ConflictError: errno.EIO,
    errors.PreconditionError: errno.EIO,
    errors.BusyError: errno.EBUSY,
    errors.AccessDeniedError: errno.EACCES,
    errors.CredentialsExpiredError: errno.EACCES,
    errors.UnavailableError: errno.EIO,
    errors.ThrottledError: errno.EIO,
    errors.RangeError: errno.EIO,
    errors.DeadlineError: errno.ETIMEDOUT,
    errors.DiskError: errno.EIO,
    errors.CancelledError: errno.EINTR,
    errors.TransitDamageError: errno.EIO,
    errors.DamagedError: errno.EIO,
    errors.UntrustedError: errno.EKEYREJECTED,
    errors.UnsupportedError: errno.EOPNOTSUPP,
    errors.NoSpaceError: errno.ENOSPC,
    errors.SourceChangedError: errno.ESTALE,
}


def errno_of(error: BaseException) -> int:
    """The errno for `error`: the table's, an OSError's own where it has one, else EIO."""
    if isinstance(error, errors.FloeError):
        for cls in type(error).__mro__:
            number = ERRNO.get(cls)
            if number is not None:
                return number
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
