"""`floe status`: the daemons, mounts, cache and store of this node, whatever of them is up.

Exit code 0 also when a daemon is not running, since a node may well do without; `--json` has `running` for each.
"""

from __future__ import annotations

import argparse
from typing import Any

import floe
from floe.cli import node, output
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.settings import Settings
from floe.cli.sizes import format_size


def add_parser(commands: Commands) -> None:
    """Add `floe status`."""
    add_json(add_command(commands, "status", "Show daemons, mounts, cache and store of this node.", run))


def run(args: argparse.Namespace) -> int:
    """Ask everybody and print what came back."""
    status = collect(settings_of(args))
    if args.json:
        output.print_json(status)
    else:
        _show(status)
    return 0


def collect(settings: Settings) -> dict[str, Any]:
    """The whole status as --json shows it; sizes in bytes."""
    index = node.index_status(settings)
    return {
        "version": floe.__version__,
        "store": {"url": settings.store, "index": index["url"]},
        "index": index,
        "packfs": node.packfs_status(settings),
        "snapshotter": node.snapshotter_status(settings.run_dir),
        "mounts": list(node.tree_mounts(settings.run_dir)),
        "stuck_processes": node.stuck_processes(settings.run_dir),
        "cache": node.cache_status(settings),
        "run_dir": str(settings.run_dir),
    }


def _show(status: dict[str, Any]) -> None:
    cache = status["cache"]
    lines = [
        ("floe", status["version"]),
        ("store", status["store"]["url"]),
        ("index", _index_text(status["index"])),
        ("packfs", _packfs_text(status["packfs"])),
        ("snapshotter", _snapshotter_text(status["snapshotter"])),
        ("cache", cache["path"] + ("" if cache["exists"] else " (not made yet)")),
    ]
    if cache["exists"]:
        used = f"{format_size(cache['used_bytes'])} of {format_size(cache['size_bytes'])} used"
        packs = f"{cache['packs']} packs ({cache['complete_packs']} complete, {cache['pinned_packs']} pinned)"
        lines.append(("", f"{used}, {packs}, {format_size(cache['disk_free_bytes'])} free on the disk"))
    lines.append(("mounts", str(len(status["mounts"]))))
    output.pairs(lines)
    for mount in status["mounts"]:
        output.line(f"  tree {mount['tree']} ({mount['mode']}{', portable' if mount['by'] == 'portable' else ''})")
        for use in mount["uses"]:
            output.line(f"    {use}" + (f"  {mount['models'][use]}" if use in mount["models"] else ""))
    for process in status["stuck_processes"]:
        output.line(f"hangs in the kernel: process {process['pid']}, {process['what']}")


def _index_text(index: dict[str, Any]) -> str:
    if index["kind"] == "none":
        return "none"
    if index["kind"] == "sqlite":
        return str(index["url"]) + ("" if index["state"] == "ok" else f" ({index['state']})")
    text = f"{index['url']}, {index['state']}"
    if "mode" not in index:
        return f"{text}: {index['error']}"
    if "reason" in index:
        text += f": {index['reason']}"
    elif "warning" in index:
        text += f", but drops keys when its memory is full (maxmemory-policy {index['maxmemory_policy']})"
    servers = f"{index['mode']} of {index['servers']}" if index["mode"] == "cluster" else index["mode"]
    used = format_size(index["used_memory_bytes"])
    limit = f" of {format_size(index['maxmemory_bytes'])}" if index["maxmemory_bytes"] else ""
    packs = f", {index['packs']} packs" if "packs" in index else ""
    return f"{text}; {servers}, version {index['version']}{packs}, {used}{limit} of memory used"


def _packfs_text(packfs: dict[str, Any]) -> str:
    if not packfs["running"]:
        return str(packfs["state"])
    text = f"running, keeper {packfs['keeper_pid']}, worker {packfs.get('pid', '?')}"
    counters = packfs.get("counters") or {}
    if counters.get("profile_frames"):
        replayed = f"{counters['profile_frames']} frames ({format_size(counters['profile_bytes'])}) replayed"
        known = [counters.get(f"profile_{kind}_frames", 0) for kind in ("used", "unused")]
        used = ", {} of them read at the start and {} not".format(*known) if any(known) else ""  # known some time later
        text += f"; start-up profiles: {replayed}{used}"
    return text


def _snapshotter_text(snapshotter: dict[str, Any]) -> str:
    if not snapshotter["running"]:
        return str(snapshotter["state"])
    counts = snapshotter.get("snapshots") or {}
    fallbacks = sum((snapshotter.get("fallbacks") or {}).values())
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"running, process {snapshotter.get('pid')}; snapshots: {shown}; layers unpacked instead: {fallbacks}"
