"""`floe version`."""

from __future__ import annotations

import argparse
import os
import platform

import floe
from floe.cli import output
from floe.cli.options import Commands, add_command, add_json


def add_parser(commands: Commands) -> None:
    """Add `floe version`."""
    add_json(add_command(commands, "version", "Print Floe's version.", run))


def run(args: argparse.Namespace) -> int:
    """Print it, with what it runs on in --json."""
    if args.json:
        output.print_json({"floe": floe.__version__, "python": platform.python_version(), "kernel": os.uname().release})
    else:
        output.line(f"floe {floe.__version__}")
    return 0
