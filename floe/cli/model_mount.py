"""`floe model mount`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import make_directory, open_cache, open_catalog
from floe.cli.names import parse_model
from floe.cli.options import MOUNTING, READING, TRUSTING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import AccessDeniedError

if TYPE_CHECKING:
    from floe.mount.modelmount import ModelMount
    from floe.store.catalog import Catalog
    from floe.store.ids import ModelRef
    from floe.store.trees import LocalTree

_DEADLINE = 60.0


def add_parser(commands: Commands) -> None:
    """Add `floe model mount`."""
    parser = add_command(commands, "mount", "Mount a model, read-only; its content is fetched as it is read.", run)
    parser.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory; made when it is not there")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="mount through pyfuse3: for a user who is not root, or a kernel without EROFS; the same as --mounter=portable",
    )
    add_settings(parser, *READING, *MOUNTING, *TRUSTING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch the model's tree and pack indexes, see that packs are served, and mount."""
    settings = settings_of(args)
    if args.portable:
        settings = replace(settings, mounter="portable")
    ref, _ = parse_model(args.name)
    with open_catalog(settings, trusting=True) as catalog:
        digest, tree, mounted = mount(settings, catalog, ref, Path(args.mountpoint).absolute())
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


def mount(settings: Settings, catalog: Catalog, ref: ModelRef, mountpoint: Path) -> tuple[str, LocalTree, ModelMount]:
    """Mount a model as this user may; the manifest's digest, the tree, the mount. AccessDeniedError: that takes root."""
    is_root = os.geteuid() == 0
    if not is_root and settings.mounter != "portable":
        raise AccessDeniedError(
            "mounting a model needs root", hint="run it as root, or give --portable to mount it for yourself"
        )
    from floe.store.trees import TreeStore  # noqa: PLC0415 - lazy: keeps --help fast

    digest, manifest = catalog.resolve_model(ref)
    make_directory(settings.run_dir, "run directory", "--run-dir", 0o755 if is_root else 0o700)
    cache = open_cache(settings)
    tree = TreeStore(catalog.store, cache).fetch(manifest.tree.digest, _DEADLINE)
    model = f"{ref.name}@{digest}" if ref.digest else str(ref)
    return digest, tree, (_mount if is_root else _mount_for_user)(settings, tree, mountpoint, model)


def _mount(settings: Settings, tree: LocalTree, mountpoint: Path, model: str) -> ModelMount:
    from floe.cli import packfs_process  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.mount.modelmount import mount_model  # noqa: PLC0415 - likewise
    from floe.mount.mounter import TreeMounter  # noqa: PLC0415 - likewise

    def stop_packfs() -> None:
        packfs_process.stop(settings.run_dir)

    return mount_model(
        tree,
        mountpoint,
        TreeMounter(settings.run_dir, open_cache(settings), loop=settings.loop, kind=settings.mounter),
        model=model,
        start_packfs=lambda: packfs_process.start(settings),
        stop_packfs=stop_packfs,
    )


def _mount_for_user(settings: Settings, tree: LocalTree, mountpoint: Path, model: str) -> ModelMount:
    from floe.mount.state import RunState  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.mount.usermount import mount_for_user  # noqa: PLC0415 - likewise

    return mount_for_user(tree, mountpoint, RunState(settings.run_dir), source(settings), model=model)


def source(settings: Settings) -> dict[str, Any]:
    """Where a reader in a process of its own has packs from: the fields of floe.fuse.portable.shared.Source."""
    first, *more = open_cache(settings).members
    return {
        "url": settings.store,
        "cache_dir": str(first.root),
        "cache_size": first.size,
        "cache_min_free": first.min_free,
        "more_caches": [(str(member.root), member.size, member.min_free) for member in more],
        "cache_bypass": settings.cache_bypass,
        "readahead": settings.readahead,
        "deadline": settings.read_deadline,
        "budget": settings.fetch_memory,
    }
