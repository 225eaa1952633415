"""Errors that the index itself tells apart."""

from __future__ import annotations

from floe.store.errors import UnavailableError


class ConnectingError(Exception):
    """The connection is being made; whoever cannot wait does without for now. Never leaves this package."""


def lasting(message: str, *, hint: str) -> UnavailableError:
    """An error that trying again will not mend: somebody has to change something first."""
    error = UnavailableError(message, hint=hint)
    error.retryable = False
    return error
