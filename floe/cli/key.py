"""`floe key`: the keys that sign what is published."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from floe.cli import output
from floe.cli.options import Commands, add_command, add_commands, add_json, settings_of

if TYPE_CHECKING:
    from floe.store.signing import PublicKey


def add_parser(commands: Commands) -> None:
    """Add `floe key` and its commands."""
    below = add_commands(add_command(commands, "key", "Make and show keys that sign what is published."))
    create = add_command(below, "create", "Make a key: FILE, which is secret, and FILE.pub, which is not.", run_create)
    create.add_argument("file", metavar="FILE", help="where the private key goes; nothing there is ever replaced")
    show = add_command(below, "show", "Print the public key of a private key's file, or of a FILE.pub.", run_show)
    show.add_argument("file", metavar="FILE", help="a private key, or a public one")
    for parser in (create, show):
        add_json(parser)


def run_create(args: argparse.Namespace) -> int:
    """Make a key and print its public half."""
    settings_of(args)
    from floe.store.keyfiles import create_key  # noqa: PLC0415 - lazy: keeps --help fast

    path = Path(args.file).expanduser().absolute()
    _print(args, path, create_key(path))
    if not args.json:
        output.note(f"{path} is secret: keep a copy offline, and give {path}.pub to nodes as trusted_keys")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print the public half of a key; nothing of the private one."""
    settings_of(args)
    from floe.store.keyfiles import public_key_at  # noqa: PLC0415 - lazy: keeps --help fast

    path = Path(args.file).expanduser().absolute()
    _print(args, path, public_key_at(path))
    return 0


def _print(args: argparse.Namespace, path: Path, key: PublicKey) -> None:
    if args.json:
        output.print_json({"file": str(path), "id": key.id, "public_key": str(key)})
    else:
        output.pairs((("id", key.id), ("public", str(key))))
