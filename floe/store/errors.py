"""Every error Floe raises on purpose.

A message says what failed, on what; `hint` says what to do next. Whether trying again may help is a
property of the error (`retryable`), so that retry is one wrapper and not a habit of each caller.
The mapping to errno lives in fuse/errno_map.py, to gRPC status in floe/rpc/status.py, to exit
codes in floe/cli/exit.py; a test fails for any class here that one of them does not map.
"""

from __future__ import annotations


class FloeError(Exception):
    """Base of all. `str(error)` is the message for people; `hint` (may be empty) is the next step."""

    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BadInputError(FloeError):
    """What the user gave cannot be used as it is; nothing was changed."""


class NotFoundError(FloeError):
    """A named thing (object, model, image, snapshot, file) does not exist."""


class StoreMissingError(NotFoundError):
    """The store's own folder or bucket does not exist: what it held may be elsewhere, and come back with it."""


class AlreadyExistsError(FloeError):
    """A name that must be new is taken."""


class ConflictError(FloeError):
    """A conditional put lost: somebody else changed the object first."""


class PreconditionError(FloeError):
    """The request is valid but the state forbids it (a parent with children, a pack not complete)."""


class BusyError(FloeError):
    """In use right now: a mountpoint, a directory another daemon owns, a tree with reads in flight."""


class AccessDeniedError(FloeError):
    """Wrong, missing or expired credentials, or no permission."""


class CredentialsExpiredError(AccessDeniedError):
    """Credentials that were good are so no more; whoever renews them may do so any moment."""

    retryable = True


class UnavailableError(FloeError):
    """A store, registry or daemon cannot be reached, or answered with a passing fault."""

    retryable = True


class ThrottledError(UnavailableError):
    """The other side asked us to slow down (HTTP 429, 503 SlowDown)."""


class RangeError(UnavailableError):
    """A range cannot be read straight into memory, or not all of it; by another way it may."""


class DeadlineError(UnavailableError):
    """The time allowed for an operation ran out."""


class DiskError(UnavailableError):
    """A disk of this machine failed or refused, the node cache's for example; the store has no part in it."""


class CancelledError(FloeError):
    """Nobody waits for the result any more (the reader was killed, the process is stopping)."""


class TransitDamageError(FloeError):
    """Bytes arrived that do not match their digest; the stored copy may be fine, so fetch again."""

    retryable = True


class DamagedError(FloeError):
    """A stored object does not match its digest or cannot be parsed, on repeated reading."""


class UntrustedError(FloeError):
    """No key of `trusted_keys` has signed it: a layer, a model or a tree. It may be whole, and is not what anybody vouched for."""


class UnsupportedError(FloeError):
    """A format version, media type or feature that this version of Floe does not know."""


class NoSpaceError(FloeError):
    """A disk, cache or quota is full."""


class SourceChangedError(FloeError):
    """A file changed, shrank or vanished while it was read; nothing was published."""
