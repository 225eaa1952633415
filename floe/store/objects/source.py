"""The local file of a `put_file`: opened with errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from floe.store.errors import AccessDeniedError, NotFoundError


def open_source(path: Path) -> BinaryIO:
    """The file. NotFoundError or AccessDeniedError names it."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise AccessDeniedError(f"cannot read {path}: {error.strerror}", hint="give this user access to it") from error
