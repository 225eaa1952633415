"""`floe model mount`."""

from __future__ import annotations

import argparse
from pathlib import Path

from floe.cli import output
from floe.cli.context import make_directory, open_cache, open_catalog
from floe.cli.names import parse_model
from floe.cli.options import READING, Commands, add_command, add_json, add_settings, settings_of

_DEADLINE = 60.0


def add_parser(commands: Commands) -> None:
    """Add `floe model mount`."""
    parser = add_command(commands, "mount", "Mount a model, read-only; its content is fetched as it is read.", run)
    parser.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory; made when it is not there")
    add_settings(parser, *READING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch the model's tree and pack indexes, see that packs are served, and mount."""
    settings = settings_of(args)
    ref, _ = parse_model(args.name)
    mountpoint = Path(args.mountpoint).absolute()
    from floe.cli import packfs_process  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.mount.modelmount import mount_model  # noqa: PLC0415 - likewise
    from floe.mount.mounter import TreeMounter  # noqa: PLC0415 - likewise
    from floe.store.trees import TreeStore  # noqa: PLC0415 - likewise

    def stop_packfs() -> None:
        packfs_process.stop(settings.run_dir)

    with open_catalog(settings) as catalog:
        digest, manifest = catalog.resolve_model(ref)
        make_directory(settings.run_dir, "run directory", "--run-dir", 0o755)
        cache = open_cache(settings)
        tree = TreeStore(catalog.store, cache).fetch(manifest.tree.digest, _DEADLINE)
    mounted = mount_model(
        tree,
        mountpoint,
        TreeMounter(settings.run_dir, cache),
        model=f"{ref.name}@{digest}" if ref.digest else str(ref),
        start_packfs=lambda: packfs_process.start(settings),
        stop_packfs=stop_packfs,
    )
    if args.json:
        output.print_json(
            {
                "ref": str(ref),
                "manifest": digest,
                "tree": tree.digest,
                "mountpoint": mounted.mountpoint,
                "resident": all(pack.complete for pack in tree.packs),
                "packfs_started": mounted.started_packfs,
            }
        )
    else:
        output.line(f"{ref} ({digest[:12]}) is mounted at {mounted.mountpoint}")
    return 0
