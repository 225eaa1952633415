"""From Floe's errors to gRPC status."""

from __future__ import annotations

import grpc

from floe.store.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    BadInputError,
    BusyError,
    CancelledError,
    ConflictError,
    CredentialsExpiredError,
    DamagedError,
    DeadlineError,
    DiskError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    RangeError,
    SourceChangedError,
    StoreMissingError,
    ThrottledError,
    TransitDamageError,
    UnavailableError,
    UnsupportedError,
    UntrustedError,
)

# Every class has its own line, subclasses too; a test fails for one that has none. containerd and the kubelet try
# again what is UNAVAILABLE.
CODES: dict[type[FloeError], grpc.StatusCode] = {
    BadInputError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    StoreMissingError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    ConflictError: grpc.StatusCode.ABORTED,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    BusyError: grpc.StatusCode.UNAVAILABLE,
    AccessDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    CredentialsExpiredError: grpc.StatusCode.UNAVAILABLE,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    ThrottledError: grpc.StatusCode.UNAVAILABLE,
    RangeError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    DiskError: grpc.StatusCode.UNAVAILABLE,
    CancelledError: grpc.StatusCode.CANCELLED,
    TransitDamageError: grpc.StatusCode.UNAVAILABLE,
    DamagedError: grpc.StatusCode.DATA_LOSS,
    UntrustedError: grpc.StatusCode.PERMISSION_DENIED,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    NoSpaceError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SourceChangedError: grpc.StatusCode.ABORTED,
}
OUTCOMES = ("ok", *sorted({code.name.lower() for code in (*CODES.values(), grpc.StatusCode.INTERNAL)}))
"""How a call may end, as metrics name it."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status code and the message, with the hint, that a caller gets; INTERNAL for what is no FloeError."""
    if not isinstance(error, FloeError):
        return grpc.StatusCode.INTERNAL, f"floe: {type(error).__name__}: {error}"
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    return code, f"{error} ({error.hint})" if error.hint else str(error)
