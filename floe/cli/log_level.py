"""`floe log-level`: how much the daemons of this node log, changed while they run."""

from __future__ import annotations

import argparse
import time
from typing import Any

from floe.cli import node, output
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.settings import Settings
from floe.store import loglevel
from floe.store.errors import AccessDeniedError, BadInputError, DeadlineError, UnavailableError

DEFAULT = "default"
_SECONDS = 3600.0  # a level that nobody takes back ends by itself: debug fills disks
_LONGEST = 7 * 86_400.0
_PATIENCE, _ENDING, _POLL = 10.0, 3.0, 0.1  # seconds


def add_parser(commands: Commands) -> None:
    """Add `floe log-level`."""
    parser = add_command(commands, "log-level", "Show or change how much the running daemons log, for a while.", run)
    levels = (*loglevel.LEVELS, DEFAULT)
    text = f"{', '.join(loglevel.LEVELS)}; {DEFAULT}: as their settings say again. Without it: show"
    parser.add_argument("level", metavar="LEVEL", nargs="?", choices=levels, help=text)
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, metavar="N", help=f"for how long, a week at most ({_SECONDS:g})"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Change it, see that it is in force, and show it."""
    settings = settings_of(args)
    if args.level:
        if not 0 < args.seconds <= _LONGEST:
            raise BadInputError(f"{args.seconds:g} s is no time to log for", hint=f"give --seconds up to {_LONGEST:g}")
        _change(settings, args.level, args.seconds)
    found, wished = levels(settings), loglevel.wished(settings.run_dir)
    if args.json:
        until = None if wished is None else wished[1]
        output.print_json({"wished": None if wished is None else wished[0], "until": until, "daemons": found})
        return 0
    for daemon, level in found.items():
        output.line(f"{daemon}: {level or 'not running, or of a version that does not tell'}")
    if wished is not None:
        left = wished[1] - time.time()
        output.line(f"{wished[0]} for {left:.0f} s more, then as the settings say")
    return 0


def levels(settings: Settings) -> dict[str, str | None]:
    """The level in force by daemon; None: it does not run, or does not tell."""
    asked: dict[str, dict[str, Any]] = {
        "packfs": node.packfs_status(settings),
        "snapshotter": node.snapshotter_status(settings.run_dir),
    }
    return {name: status.get("log_level") for name, status in asked.items()}


def _change(settings: Settings, level: str, seconds: float) -> None:
    """UnavailableError when nobody would follow; DeadlineError when somebody does not in time."""
    running = [name for name, now in levels(settings).items() if now is not None]
    if not running:
        raise UnavailableError(
            f"no daemon that could follow runs in {settings.run_dir}", hint="check --run-dir, or see `floe status`"
        )
    try:
        if level == DEFAULT:
            _end(settings)
            return
        loglevel.wish(settings.run_dir, level, seconds)
    except PermissionError as error:
        raise AccessDeniedError(f"cannot write {settings.run_dir / loglevel.FILE}", hint="run it as root") from error
    except OSError as error:
        raise UnavailableError(f"cannot write {settings.run_dir / loglevel.FILE}: {error.strerror}") from error
    until = time.monotonic() + _PATIENCE
    while late := [name for name, now in levels(settings).items() if name in running and now != level]:
        if time.monotonic() > until:
            raise DeadlineError(
                f"{' and '.join(late)} did not take up the level {level} in {_PATIENCE:g} s", hint="see its log"
            )
        time.sleep(_POLL)


def _end(settings: Settings) -> None:
    """Take back what was wished for, and wait until that is seen; not for long, since the daemons' own level may be the same."""
    ended = loglevel.wished(settings.run_dir)
    loglevel.unwish(settings.run_dir)
    until = time.monotonic() + _ENDING
    while ended is not None and ended[0] in levels(settings).values() and time.monotonic() < until:
        time.sleep(_POLL)
