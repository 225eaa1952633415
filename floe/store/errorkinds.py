"""Errors as causes that metrics count by: few, and the same whatever the message says. Pure."""

from __future__ import annotations

from floe.store import errors
from floe.store.errors import FloeError

# The more special one first.
_KINDS = (
    (errors.ThrottledError, "throttled"),
    (errors.DeadlineError, "deadline"),
    (errors.DiskError, "disk"),
    (errors.UnavailableError, "unavailable"),
    (errors.CredentialsExpiredError, "credentials_expired"),
    (errors.AccessDeniedError, "denied"),
    (errors.NotFoundError, "not_found"),
    (errors.TransitDamageError, "damaged_in_transit"),
    (errors.DamagedError, "damaged"),
)
OTHER = "other"
KINDS = (*(name for _, name in _KINDS), OTHER)


def kind_of(error: FloeError) -> str:
    """One of KINDS."""
    return next((name for kind, name in _KINDS if isinstance(error, kind)), OTHER)
