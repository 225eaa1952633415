"""`floe ui`: a page that shows this node, for a browser on it; for other machines with a token."""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import signal
import sys
import threading
from pathlib import Path

from floe.cli import doctor, output
from floe.cli.options import Commands, add_command, add_settings, settings_of
from floe.store.errors import AccessDeniedError, BadInputError

_LISTEN = "127.0.0.1:9640"
_SHORTEST = 16  # characters of a token
_TEXT = (
    "Serve a page that shows this node: mounts and how much of them is here, rates, starts, problems. Ctrl-C ends it."
)


def add_parser(commands: Commands) -> None:
    """Add `floe ui`."""
    parser = add_command(commands, "ui", _TEXT, run)
    parser.add_argument("--listen", default=_LISTEN, metavar="ADDRESS", help=f"IP:PORT, port 0 for any ({_LISTEN})")
    text = "a file with the token that browsers must give; without it one is made, unless only this machine can connect"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    add_settings(parser, "containerd_socket", *doctor.SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    settings = settings_of(args)
    host, port = _address(args.listen)
    token = _token(args.token_file) if args.token_file else None
    made = token is None and not ipaddress.ip_address(host).is_loopback
    if made:
        token = secrets.token_urlsafe(24)
    from floe.cli.bundle import redactor  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.cli.examined import examined  # noqa: PLC0415 - likewise
    from floe.cli.live import Live  # noqa: PLC0415 - likewise
    from floe.cli.ui_server import PageServer  # noqa: PLC0415 - likewise

    clean = redactor(settings, os.environ)
    server = PageServer(host, port, Live(settings, examined(settings)), clean.value, token=token)

    def stop(*_: object) -> None:
        threading.Thread(target=server.close).start()  # it waits for the loop that this signal interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    shown = f"[{host}]" if ":" in host else host
    output.line(f"http://{shown}:{server.port}/" + (f"?token={token}" if made else ""))
    sys.stdout.flush()  # this process goes on, and who reads a pipe or a file waits for it
    if token is not None:
        output.note("what goes over the network is not encrypted: prefer `ssh -L` where others can listen")
    server.serve()
    return 0


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError as error:
        raise BadInputError(f"--listen: {text!r} is no IP:PORT", hint=f"write {_LISTEN} or [::1]:9640") from error
    if not 0 <= number < 1 << 16:
        raise BadInputError(f"--listen: {number} is no port", hint=f"write {_LISTEN}")
    return str(address), number


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except PermissionError as error:
        raise AccessDeniedError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read a token from {path}: {error}") from error
    if len(token) < _SHORTEST or not all(char.isalnum() or char in "-_." for char in token):
        hint = f"make one: head -c 24 /dev/urandom | base64 | tr +/ -_ > {path}"
        raise BadInputError(f"{path} holds no token of {_SHORTEST} letters, digits, -, _ and . at least", hint=hint)
    return token
