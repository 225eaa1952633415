"""`floe packfs`: the pack filesystem. The command becomes its keeper; `--worker` is what the keeper starts."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from floe.cli.context import make_cache_directories, make_directory
from floe.cli.options import READING, Commands, add_command, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import FloeError

_log = logging.getLogger(__name__)

WORKER_KEYS = (
    *("store", "store_timeout", "cache_dir", "cache_dirs", "run_dir", "cache_size", "cache_min_free"),
    *READING,
    *("packfs_metrics", "otlp_endpoint", "log_level", "log_format"),
)
"""The settings that a worker goes by."""


def add_parser(commands: Commands) -> None:
    """Add `floe packfs`."""
    parser = add_command(commands, "packfs", "Run the pack filesystem in the foreground.", run)
    parser.add_argument(
        "--force", action="store_true", help="end the one that runs although packs are in use: their readers get errors"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_settings(parser, *READING, "otlp_endpoint")
    add_settings(parser, "packfs_metrics", aliases=("--metrics",))


def run(args: argparse.Namespace) -> int:
    """Check the settings, then become the keeper; or be its worker."""
    settings = settings_of(args, daemon=True)
    if args.worker:
        from floe.cli.packfs_worker import run_worker  # noqa: PLC0415 - lazy: keeps --help fast

        return run_worker(settings)
    _check(settings)
    return _become_keeper(settings, force=args.force)


def _check(settings: Settings) -> None:
    """Fail now, in the caller's terminal, for what every worker would fail for."""
    from floe.store.objects import open_store  # noqa: PLC0415 - lazy: keeps --help fast

    open_store(settings.store).close()
    make_directory(settings.run_dir, "run directory", "--run-dir", 0o755)
    try:
        make_cache_directories(settings)
    except FloeError as error:
        if "LISTEN_FDS" not in os.environ:  # systemd kept no mounts for us, whose readers need no cache
            raise
        _log.error("%s; mounts that systemd kept are served from the store", error)


def _become_keeper(settings: Settings, *, force: bool) -> NoReturn:
    """Replace this process: the keeper outlives everything, so it starts with nothing but its own few imports."""
    worker = [sys.executable, "-m", "floe", "packfs", "--worker", *settings.as_flags(*WORKER_KEYS)]
    keeper = [sys.executable, "-m", "floe.fuse.keeper", "--run-dir", str(settings.run_dir)]
    if force:
        keeper.append("--force")
    # glibc cannot trim memory that is locked, so it shall keep few arenas: measured, a worker that streamed 600 MiB
    # peaks at 115 MiB instead of 160. Frames and downloads come from memory that is used again, not from pages that the
    # kernel clears each time: measured, a first read of compressed weights is 12 to 20% faster, the peak the same.
    for name, value in (("ARENA_MAX", 2), ("MMAP_THRESHOLD_", 16 << 20), ("TRIM_THRESHOLD_", 64 << 20)):
        os.environ.setdefault(f"MALLOC_{name}", str(value))
    # `python -m` looks into the current directory first: not one that somebody else may write to.
    os.chdir("/")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*keeper, "--", *worker])  # noqa: S606 - our own interpreter, no shell
