"""`floe umount`: undoes `floe model mount`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from floe.cli import output
from floe.cli.context import open_cache
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.settings import Settings
from floe.store.errors import NotFoundError

_PATIENCE = 5.0  # seconds for reads in flight


def add_parser(commands: Commands) -> None:
    """Add `floe umount`."""
    parser = add_command(commands, "umount", "Unmount a model.", run)
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="what was given to floe model mount")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Unmount, and stop the pack filesystem when a mount of a model had started it and nothing needs it now."""
    mountpoint = Path(args.mountpoint).absolute()
    stopped = unmount(settings_of(args), mountpoint)
    if args.json:
        output.print_json({"mountpoint": str(mountpoint), "packfs_stopped": stopped})
    return 0


def unmount(settings: Settings, mountpoint: Path) -> bool:
    """Unmount as this user may; whether the pack filesystem was stopped. NotFoundError, BusyError, DeadlineError."""
    is_root = os.geteuid() == 0
    if not settings.run_dir.is_dir() or (is_root and not any(root.is_dir() for root in settings.cache_roots)):
        raise NotFoundError(f"no model is mounted at {mountpoint}", hint="check --run-dir and --cache-dir")
    if not is_root:
        from floe.mount.state import RunState  # noqa: PLC0415 - lazy: keeps --help fast
        from floe.mount.usermount import umount_for_user  # noqa: PLC0415 - likewise

        umount_for_user(mountpoint, RunState(settings.run_dir))
        return False
    from floe.cli import packfs_process  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.mount.modelmount import umount_model  # noqa: PLC0415 - likewise
    from floe.mount.mounter import TreeMounter  # noqa: PLC0415 - likewise

    stopped: list[bool] = []
    mounter = TreeMounter(settings.run_dir, open_cache(settings), patience=_PATIENCE)
    umount_model(mountpoint, mounter, stop_packfs=lambda: stopped.append(packfs_process.stop(settings.run_dir)))
    return any(stopped)
