"""Docker's credential helpers: a program `docker-credential-NAME`, asked for one registry's credentials.

Source: docker-credential-helpers, "Development": `get` with the server's name on standard input answers a JSON object with
`Username` and `Secret`; a failure is a message on standard output and another exit code than 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping

from floe.ingest.oci import dockerconfig
from floe.ingest.oci.credentials import Credentials
from floe.store.errors import AccessDeniedError, BadInputError

_TIMEOUT = 60.0  # seconds; gcloud takes two, a helper that asks a browser never ends
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_FOUND = "credentials not found"
_SAID_MAX = 300  # characters of a helper's own message


def get(name: str, server: str, environ: Mapping[str, str]) -> Credentials | None:
    """What `docker-credential-NAME` holds for `server`; None when it says that it holds nothing.

    BadInputError: `name` is none. AccessDeniedError: it is not installed, fails, or does not answer in time.
    """
    if _NAME.fullmatch(name) is None:
        raise BadInputError(f"{name!r} in Docker's config is no name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        code, out, err = _run([program, "get"], server.encode(), environ)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise AccessDeniedError(
            f"credential helper {program}, which Docker's config names for {server}, "
            + ("is not installed" if missing else f"cannot be run: {error.strerror}"),
            hint=f"put {program} on the PATH, or take it out of Docker's config",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise AccessDeniedError(
            f"credential helper {program} did not answer for {server} within {_TIMEOUT:.0f} s",
            hint=f"try it: echo {server} | {program} get",
        ) from error
    if code != 0:
        said = _printable(out) or _printable(err)
        if _NOT_FOUND in f"{_printable(out)} {_printable(err)}":
            return None
        raise AccessDeniedError(
            f"credential helper {program} failed for {server} (exit code {code}): {said or 'it said nothing'}",
            hint=f"try it: echo {server} | {program} get",
        )
    try:
        value = json.loads(out)
        username, secret = value.get("Username") or "", value.get("Secret") or ""
    except (ValueError, AttributeError):
        # What it wrote may be a secret: it is not shown.
        raise AccessDeniedError(
            f"credential helper {program} answered for {server} with something else than credentials",
            hint=f"try it: echo {server} | {program} get",
        ) from None
    return dockerconfig.login(str(username), str(secret), "", f"credential helper {program}")


def _run(command: list[str], text: bytes, environ: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Exit code and output. Whatever ends this ends the program too, and what it started."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=dict(environ), start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(text, timeout=_TIMEOUT)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, out, err


def _printable(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_SAID_MAX]
