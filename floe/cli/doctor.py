"""`floe doctor`: what on this node would keep Floe from working, and what mends it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from floe.cli import node, output
from floe.cli.options import SIGNING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from floe.doctor.finding import Finding, Node

SETTINGS = ("address", "read_deadline", *SIGNING)  # that findings go by, besides those of all commands
_SECONDS = 20.0
_CONTAINERD_CONFIG = Path("/etc/containerd/config.toml")
_MARKS = {"ok": "ok", "skipped": "-", "warning": "WARNING", "error": "ERROR"}


def add_parser(commands: Commands) -> None:
    """Add `floe doctor`."""
    text = "Look for what would keep Floe from working here; exit status 1 for errors, 3 for warnings only."
    parser = add_command(commands, "doctor", text, run)
    parser.add_argument(
        "--role", choices=("reader", "writer", "remover"), default="reader", help="whose needs (reader)"
    )
    parser.add_argument("--probe-writes", action="store_true", help="also try what writes: store, cache disk, kernel")
    parser.add_argument("--seconds", type=float, default=_SECONDS, metavar="N", help=f"how long to wait ({_SECONDS:g})")
    parser.add_argument(
        "--containerd-config", type=Path, metavar="FILE", help="containerd's (/etc/containerd/config.toml)"
    )
    parser.add_argument("--containerd", type=Path, metavar="FILE", help="containerd's program (containerd on the PATH)")
    add_settings(parser, *SETTINGS)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Examine, print, and end as badly as it looks."""
    from floe.doctor.examine import examine, exit_code  # noqa: PLC0415 - lazy: keeps --help fast

    if not 0 < args.seconds <= 3600:
        raise BadInputError(f"{args.seconds:g} s is no time to wait", hint="give --seconds above 0, an hour at most")
    examined = node_of(
        settings_of(args),
        role=args.role,
        may_write=args.probe_writes,
        containerd_config=args.containerd_config or _CONTAINERD_CONFIG,
        containerd=args.containerd,
    )
    found = examine(examined, args.seconds, _say)
    code = exit_code(found)
    if args.json:
        output.print_json({"exit_status": code, "findings": [asdict(finding) for finding in found]})
    else:
        _show(found)
    return code


def _show(found: list[Finding]) -> None:
    output.table(("CHECK", "", "FINDING"), [(one.check, _MARKS[one.level], one.text) for one in found])
    to_mend = [one for one in found if one.mend and one.level in ("warning", "error")]
    if to_mend:
        output.line()
        for one in to_mend:
            output.line(f"{one.check}: {one.mend}")
    counts = {level: sum(one.level == level for one in found) for level in ("error", "warning", "skipped")}
    output.line()
    output.line(f"{counts['error']} errors, {counts['warning']} warnings, {counts['skipped']} skipped")


def _say(check: str) -> None:
    if sys.stderr.isatty():
        output.note(f"doctor: {check} looked at")


def node_of(
    settings: Settings,
    *,
    role: str = "reader",
    may_write: bool = False,
    containerd_config: Path = _CONTAINERD_CONFIG,
    containerd: Path | None = None,
) -> Node:
    """What is examined of the node with these settings; see finding.Node."""
    from floe.doctor.finding import Node  # noqa: PLC0415 - lazy: keeps --help fast

    return Node(
        store=settings.store,
        index=settings.index,
        cache_dirs=settings.cache_roots,
        run_dir=settings.run_dir,
        root=settings.root,
        socket=settings.socket,
        min_free=settings.cache_min_free.of,
        read_deadline=settings.read_deadline,
        trusted_keys=settings.trusted_keys.sources,
        signing_key=settings.signing_key,
        packfs=lambda: node.packfs_status(settings),
        snapshotter=lambda: node.snapshotter_status(settings.run_dir),
        index_state=lambda: node.index_status(settings),
        index_denied=lambda writes: node.index_denied(settings, writes=writes),
        notes_denied=lambda: node.notes_denied(settings),
        agent=lambda: node.agent_state(settings.run_dir),
        role=role,
        may_write=may_write,
        containerd_config=containerd_config.absolute(),
        containerd=containerd,
    )
