"""`floe containerd`: Floe put into containerd's configuration, and taken out again."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import make_directory
from floe.cli.options import Commands, add_command, add_commands, add_json, add_settings, settings_of
from floe.store.errors import AccessDeniedError, BadInputError, FloeError

if TYPE_CHECKING:
    from floe.containerd.configure import Configuration, Plan
    from floe.containerd.moving import Stranded
    from floe.containerd.version import Version

_DEFAULT_FILE = "/etc/containerd/config.toml"
_HANDLER = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # as Kubernetes names a handler of a RuntimeClass


def add_parser(commands: Commands) -> None:
    """Add `floe containerd` and its commands."""
    below = add_commands(add_command(commands, "containerd", "Put Floe into containerd's configuration."))
    text = "Make Floe containerd's snapshotter; shows what it changes, and restarts nothing."
    configure = add_command(below, "configure", text, run_configure)
    which = configure.add_mutually_exclusive_group()
    which.add_argument("--default", action="store_true", help="for all pods; so it is without --runtime")
    which.add_argument("--runtime", metavar="NAME", help="for pods of this runtime handler only, for example runc-floe")
    add_settings(configure, "address")
    unconfigure = add_command(
        below, "unconfigure", "Put the configuration back as it was, byte for byte.", run_unconfigure
    )
    for parser in (configure, unconfigure):
        parser.add_argument("--dry-run", action="store_true", help="show the difference, and change nothing")
        parser.add_argument(
            "--force", action="store_true", help="go on though containers or images of this node will not start"
        )
    show = add_command(below, "show", "Say what Floe did to the configuration, and what is in force.", run_show)
    for parser in (configure, unconfigure, show):
        _add_files(parser)
        add_json(parser)


def run_configure(args: argparse.Namespace) -> int:
    """Plan, show, write, verify."""
    from floe.containerd.moving import after_configure, refuse_configure  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.containerd.wanted import Request  # noqa: PLC0415 - likewise

    if args.runtime is not None and not _HANDLER.fullmatch(args.runtime):
        raise BadInputError(
            f"{args.runtime!r} is no name of a runtime handler",
            hint="small letters, digits and dashes, for example runc-floe",
        )
    settings = settings_of(args)
    configuration = _configuration(args)
    version = _version(args, configuration)
    request = Request(version, settings.socket, settings.root, args.runtime)
    if args.dry_run:
        plan = configuration.plan(request)
        found = after_configure(configuration, plan, args.runtime)
        return _show_plan(args, configuration, plan, version, found)
    _must_be_root()
    if not configuration.kept.path.parent.is_dir():
        configuration.plan(request)  # what is refused makes no directory either
        make_directory(configuration.kept.path.parent, "directory", "--containerd-config", mode=0o755)
    with configuration.kept.locked():
        plan = configuration.plan(request)
        found = after_configure(configuration, plan, args.runtime)
        if not args.force:
            refuse_configure(found)
        verified = configuration.apply(plan)
    return _show_plan(args, configuration, plan, version, found, verified=verified)


def run_unconfigure(args: argparse.Namespace) -> int:
    """Plan, show, put back."""
    from floe.containerd.moving import Stranded, after_undo, refuse_undo  # noqa: PLC0415 - lazy: keeps --help fast

    settings_of(args)
    configuration = _configuration(args)
    if args.dry_run:
        plan = configuration.plan_undo()
        return _show_plan(args, configuration, plan, None, after_undo(configuration, plan))
    _must_be_root()
    if not configuration.kept.path.parent.is_dir():
        return _show_plan(args, configuration, configuration.plan_undo(), None, Stranded())
    with configuration.kept.locked():
        plan = configuration.plan_undo()
        found = after_undo(configuration, plan)
        if not args.force:
            refuse_undo(found, configuration)
        configuration.undo(plan)
    return _show_plan(args, configuration, plan, None, found)


def run_show(args: argparse.Namespace) -> int:
    """What was done, and what containerd goes by."""
    from floe.containerd.status import status_of  # noqa: PLC0415 - lazy: keeps --help fast

    settings_of(args)
    configuration = _configuration(args)
    found = status_of(configuration, _version(args, configuration))
    if args.json:
        output.print_json(found)
        return 0
    output.pairs((name.replace("_", " "), _text(value)) for name, value in found.items())
    return 0


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("containerd")
    group.add_argument("--containerd-config", type=Path, metavar="FILE", help=f"the file to change ({_DEFAULT_FILE})")
    group.add_argument(
        "--main", type=Path, metavar="FILE", help="what containerd is started with, when it imports that file"
    )
    group.add_argument("--containerd", type=Path, metavar="FILE", help="containerd's program (containerd on the PATH)")
    group.add_argument("--containerd-version", metavar="X.Y", help="instead of asking the program, for example 1.7")


def _configuration(args: argparse.Namespace) -> Configuration:
    from floe.containerd.configure import Configuration  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.containerd.version import find_binary  # noqa: PLC0415 - likewise

    file = (args.containerd_config or Path(_DEFAULT_FILE)).absolute()
    if file.is_dir():
        raise BadInputError(f"{file} is a directory", hint="name containerd's configuration file")
    main = args.main.absolute() if args.main is not None else file
    return Configuration(file, main, find_binary(args.containerd))


def _version(args: argparse.Namespace, configuration: Configuration) -> Version:
    """The version to write for. A program that was only found, and is of another one, is not asked for anything."""
    from floe.containerd.version import detect  # noqa: PLC0415 - lazy: keeps --help fast

    version = detect(configuration.binary, args.containerd_version)
    if args.containerd_version is not None and args.containerd is None and configuration.binary is not None:
        try:
            same = detect(configuration.binary, None) == version
        except FloeError:
            same = False
        if not same:
            configuration.binary = None
    return version


def _must_be_root() -> None:
    if os.geteuid() != 0:
        raise AccessDeniedError(
            "only root may change containerd's configuration",
            hint="run as root, or see with --dry-run what would change",
        )


def _show_plan(
    args: argparse.Namespace,
    configuration: Configuration,
    plan: Plan,
    version: Version | None,
    found: Stranded,
    *,
    verified: str = "",
) -> int:
    """The difference, and what is to be done next."""
    from floe.containerd.configure import RESTART  # noqa: PLC0415 - lazy: keeps --help fast

    path, diff = configuration.kept.path, plan.diff(configuration.kept.path)
    written = plan.changed and not args.dry_run
    notes = [*plan.notes, *found.notes]
    if found.unasked is not None:
        notes.append(f"which containers and images are here was not asked: {found.unasked}")
    if args.json:
        output.print_json(
            {
                "file": str(path),
                "containerd_version": None if version is None else str(version),
                "config_version": plan.config_version or None,
                "runtime": plan.record.runtime if plan.record else None,
                "changed": plan.changed,
                "written": written,
                "backup": str(configuration.kept.backup) if configuration.kept.backup.exists() else None,
                "diff": diff,
                "notes": notes,
                "stranded": found.as_json(),
                "verified": verified or None,
                "next": RESTART if written else None,
            }
        )
        return 0
    for line in diff.splitlines():
        output.line(line)
    for note in notes:
        output.note(note)
    for line in found.lines():
        output.note(f"does not start after this: {line}")
    if verified:
        output.note(verified)
    if written:
        output.note(f"wrote {path}; containerd goes by it after: {RESTART}")
    elif plan.changed:
        output.note("nothing was written: this was a dry run")
    else:
        output.note(f"{path} is as it should be; nothing was written")
    return 0
