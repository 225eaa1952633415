"""How a command ends: 0 done, 1 failed, 2 used wrongly, 3 done and damage found, 130 interrupted; one line and a hint, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

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

DONE, FAILED, USAGE, DAMAGE, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES: dict[type[FloeError], int] = {
    FloeError: FAILED,
    BadInputError: USAGE,
    NotFoundError: FAILED,
    StoreMissingError: FAILED,
    AlreadyExistsError: FAILED,
    ConflictError: FAILED,
    PreconditionError: FAILED,
    BusyError: FAILED,
    AccessDeniedError: FAILED,
    CredentialsExpiredError: FAILED,
    UnavailableError: FAILED,
    ThrottledError: FAILED,
    RangeError: FAILED,
    DeadlineError: FAILED,
    DiskError: FAILED,
    CancelledError: FAILED,
    TransitDamageError: FAILED,
    DamagedError: FAILED,
    UntrustedError: FAILED,
    UnsupportedError: FAILED,
    NoSpaceError: FAILED,
    SourceChangedError: FAILED,
}


def exit_code(error: FloeError) -> int:
    """The exit code for `error`; a class without an entry of its own goes by its nearest base."""
    return next(EXIT_CODES[base] for base in type(error).__mro__ if base in EXIT_CODES)


def report(error: FloeError) -> int:
    """Say what failed, and what to do next, on stderr; returns the exit code."""
    lines = [f"floe: error: {error}"]
    if error.hint:
        lines.append(f"floe: hint: {error.hint}")
    _say("\n".join(lines))
    return exit_code(error)


def guard(action: Callable[[], int]) -> int:
    """Run `action` and turn how it ends into an exit code. Programming errors keep their traceback."""
    try:
        code = action()
        sys.stdout.flush()
    except FloeError as error:
        return report(error)
    except KeyboardInterrupt:
        _say("floe: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; stdout must not complain again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _say(f"floe: error: {name}{error.strerror or error}")
        return FAILED
    return code


def _say(text: str) -> None:
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody listens; the exit code still tells
