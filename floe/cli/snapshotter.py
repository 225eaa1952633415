"""`floe snapshotter`: the daemon that containerd talks to."""

from __future__ import annotations

import argparse

from floe.cli.context import make_directory
from floe.cli.options import MOUNTING, TRUSTING, Commands, add_command, add_settings, settings_of

KEYS = ("address", "prepare_timeout", "on_store_error", "prefetch_at_prepare", "otlp_endpoint")


def add_parser(commands: Commands) -> None:
    """Add `floe snapshotter`."""
    parser = add_command(commands, "snapshotter", "Run the containerd snapshotter in the foreground.", run)
    add_settings(parser, *KEYS, *MOUNTING, *TRUSTING)
    add_settings(parser, "snapshotter_metrics", aliases=("--metrics",))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM; containers and their mounts are left as they are."""
    settings = settings_of(args, daemon=True)
    from floe.snapshotter.config import SnapshotterConfig  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.snapshotter.daemon import serve  # noqa: PLC0415 - likewise

    make_directory(settings.run_dir, "run directory", "--run-dir", 0o755)
    make_directory(settings.root, "snapshotter's directory", "--root")
    return serve(
        SnapshotterConfig(
            address=settings.socket,
            root=settings.root,
            run_dir=settings.run_dir,
            cache_dir=settings.cache_roots[0],
            cache_dirs=settings.cache_roots[1:],
            store_url=settings.store,
            index_url=None if settings.index == "none" else settings.index,
            trusted_keys=settings.trusted_keys.sources,
            prepare_timeout=settings.prepare_timeout,
            on_store_error=settings.on_store_error,
            prefetch_at_prepare=settings.prefetch_at_prepare,
            mounter=settings.mounter,
            loop=settings.loop,
            log_level=settings.log_level,
            metrics_address=settings.metrics("snapshotter"),
            otlp_endpoint=settings.otlp_endpoint,
        )
    )
