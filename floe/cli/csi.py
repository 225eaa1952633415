"""`floe csi`: the driver that kubelets talk to."""

from __future__ import annotations

import argparse
import os
import socket

from floe.cli.context import make_directory, open_cache, open_catalog
from floe.cli.options import MOUNTING, TRUSTING, Commands, add_command, add_settings, settings_of
from floe.store.errors import AccessDeniedError


def add_parser(commands: Commands) -> None:
    """Add `floe csi`."""
    parser = add_command(
        commands, "csi", "Run the CSI driver, which mounts models as volumes of pods, in the foreground.", run
    )
    add_settings(parser, "kubelet_dir", "csi_rules", *MOUNTING, *TRUSTING)
    add_settings(parser, "csi_metrics", aliases=("--metrics",))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM; volumes are left as they are."""
    settings = settings_of(args, daemon=True)
    if os.geteuid() != 0:
        raise AccessDeniedError("mounting models for pods needs root", hint="run it as root, or by its unit")
    from floe.cli import packfs_process  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.cli.names import parse_model  # noqa: PLC0415 - likewise
    from floe.csi.daemon import CsiConfig, serve  # noqa: PLC0415 - likewise

    def stop_packfs() -> None:
        packfs_process.stop(settings.run_dir)

    make_directory(settings.run_dir, "run directory", "--run-dir", 0o755)
    config = CsiConfig(
        address=settings.csi_socket,
        run_dir=settings.run_dir,
        node=socket.gethostname(),
        rules=settings.csi_rules.rules,
        parse=lambda text: parse_model(text)[0],
        stop_packfs=stop_packfs,
        mounter=settings.mounter,
        loop=settings.loop,
        metrics_address=settings.metrics("csi"),
    )
    with open_catalog(settings, trusting=True) as catalog:
        return serve(config, catalog, open_cache(settings))
