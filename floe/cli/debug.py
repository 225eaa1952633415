"""`floe debug`: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path

from floe.cli import output
from floe.cli.options import SIGNING, Commands, add_command, add_commands, add_json, add_settings, settings_of
from floe.cli.settings import KEYS
from floe.cli.sizes import format_size
from floe.store.errors import AlreadyExistsError, BadInputError


def add_parser(commands: Commands) -> None:
    """Add `floe debug` and its command."""
    below = add_commands(add_command(commands, "debug", "Collect what a bug report needs."))
    text = "Write what is known of this node, without secrets, to one archive."
    bundle = add_command(below, "bundle", text, run_bundle)
    bundle.add_argument("file", metavar="FILE", nargs="?", help="a new .tar.gz (floe-debug-HOST-TIME.tar.gz, here)")
    add_settings(bundle, "containerd_socket", *SIGNING, *(key for key in KEYS if key.endswith("_metrics")))
    add_json(bundle)


def run_bundle(args: argparse.Namespace) -> int:
    """Collect, part by part; what cannot be had is said, and is no failure."""
    settings = settings_of(args)
    from floe.cli.bundle import write  # noqa: PLC0415 - lazy: keeps --help fast

    name = f"floe-debug-{socket.gethostname()}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz"
    path = Path(args.file or name).expanduser().absolute()
    try:
        found = write(path, settings, os.environ, _say)
    except FileExistsError as error:
        raise AlreadyExistsError(f"{path} is there already", hint="give another FILE") from error
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}", hint="give another FILE") from error
    if args.json:
        output.print_json(found)
        return 0
    for part, problem in found["errors"].items():
        output.note(f"without {part}: {problem}")
    output.line(
        f"{path}: {len(found['files'])} files, {format_size(found['bytes'])}; look through it before you send it"
    )
    return 0


def _say(part: str) -> None:
    if sys.stderr.isatty():
        output.note(f"debug bundle: {part}")
