"""`floe status`: the daemons, mounts, cache and store of this node, whatever of them is up.

Exit code 0 also when a daemon is not running, since a node may well do without; `--json` has `running` for each.
"""

from __future__ import annotations

import argparse
from typing import Any

import floe
from floe.cli import node, output
from floe.cli.options import TRUSTING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.cli.sizes import format_size

# What completion does, for people.
_STATES = {
    "new": "looks what is missing",
    "waiting": "waits for a quiet moment",
    "running": "fetches",
    "full": "stopped, no room in the cache",
    "resting": "store or disk failed, tries again",
    "incomplete": "some cannot be had, tries again later",
}


def add_parser(commands: Commands) -> None:
    """Add `floe status`."""
    parser = add_command(commands, "status", "Show daemons, mounts, cache and store of this node.", run)
    add_settings(parser, *TRUSTING)
    add_json(parser)


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
    packfs = node.packfs_status(settings)
    cache = node.cache_status(settings)
    judged = {disk["path"]: disk for disk in packfs.pop("cache", ())}
    for directory in cache["directories"]:  # as its writer sees it, if one runs
        directory.update({key: value for key, value in judged.get(directory["path"], {}).items() if key != "path"})
    mounts = list(node.tree_mounts(settings.run_dir))
    residency = packfs.pop("residency", {})
    damaged = packfs.pop("damaged", [])
    for mount in mounts:
        mount["residency"] = residency.get(mount["tree"])
    return {
        "version": floe.__version__,
        "store": {"url": settings.store, "index": index["url"]},
        "index": index,
        "trust": node.trust_status(settings),
        "packfs": packfs,
        "snapshotter": node.snapshotter_status(settings.run_dir),
        "mounts": mounts,
        "damaged": damaged,
        "stuck_processes": node.stuck_processes(settings.run_dir),
        "cache": cache,
        "run_dir": str(settings.run_dir),
    }


def _show(status: dict[str, Any]) -> None:
    cache = status["cache"]
    lines = [
        ("floe", status["version"]),
        ("store", status["store"]["url"]),
        ("index", _index_text(status["index"])),
        ("trust", _trust_text(status["trust"])),
        ("packfs", _packfs_text(status["packfs"])),
        ("snapshotter", _snapshotter_text(status["snapshotter"])),
        ("cache", ", ".join(d["path"] + ("" if d["exists"] else " (not made yet)") for d in cache["directories"])),
    ]
    if cache["exists"]:
        used = f"{format_size(cache['used_bytes'])} of {format_size(cache['size_bytes'])} used"
        packs = f"{cache['packs']} packs ({cache['complete_packs']} complete, {cache['pinned_packs']} pinned)"
        lines.append(("", f"{used}, {packs}, {format_size(cache['disk_free_bytes'])} free on the disk"))
    lines += [("", text) for directory in cache["directories"] if (text := _directory_text(directory, cache))]
    lines += [("", text) for text in _cache_problems(cache, status["packfs"].get("counters") or {})]
    lines.append(("mounts", str(len(status["mounts"]))))
    output.pairs(lines)
    for mount in status["mounts"]:
        output.line(f"  tree {mount['tree']} ({mount['mode']}{', portable' if mount['by'] == 'portable' else ''})")
        if mount["residency"]:
            output.line(f"    {_residency_text(mount['mode'], mount['residency'])}")
        for use in mount["uses"]:
            output.line(f"    {use}" + (f"  {mount['models'][use]}" if use in mount["models"] else ""))
    for pack in status["damaged"]:
        whose = f", of {', '.join(pack['sources'])}" if pack["sources"] else ""
        output.line(
            f"damaged in the store: pack {pack['pack']}{whose}, {len(pack['frames'])} frames, since {pack['since']}"
        )
    for process in status["stuck_processes"]:
        output.line(f"hangs in the kernel: process {process['pid']}, {process['what']}")


def _directory_text(directory: dict[str, Any], cache: dict[str, Any]) -> str:
    """What is to be said of one directory of the cache; of an only one that is well nothing."""
    parts = []
    if len(cache["directories"]) > 1 and directory["exists"]:
        parts.append(f"{format_size(directory['used_bytes'])} of {format_size(directory['size_bytes'])} used")
    if directory.get("state", "ok") != "ok":
        parts.append(f"{directory['state'].upper()} {directory['problem']}".strip())
    if "bypass" in directory:
        parts += _bypass_texts(directory["bypass"])
    return f"{directory['path']}: {', '.join(parts)}" if parts else ""


def _bypass_texts(bypass: dict[str, Any]) -> list[str]:
    if not bypass["slow"]:
        return ["reads go around it (cache_bypass is always)"] if bypass["bypassed"] else []
    parts = ["A HIT COSTS MORE THAN A MISS"]
    sizes = [size for size in bypass["hit_seconds"] if size in bypass["miss_seconds"]]
    if sizes:
        size = sizes[-1]
        hit, miss = (bypass[f"{kind}_seconds"][size] * 1e3 for kind in ("hit", "miss"))
        parts.append(f"{format_size(int(size))} take {hit:.1f} ms from its disk, {miss:.1f} ms from the store")
    return [*parts, "reads go around it" if bypass["bypassed"] else "and is read (cache_bypass is never)"]


def _cache_problems(cache: dict[str, Any], counters: dict[str, Any]) -> list[str]:
    """What keeps content out of the node cache, or kept it out since the worker's start."""
    disks = [directory.get("disk_problem") for directory in cache["directories"]]
    found = [f"{problem}: reads go on without the cache" for problem in disks if problem]
    writes, reads = counters.get("kept_write_errors", 0), counters.get("kept_read_errors", 0)
    if writes or reads:
        found.append(
            f"its disk failed {writes} writes and {reads} reads since the worker's start; nobody's read failed"
        )
    return found


def _residency_text(mode: str, residency: dict[str, Any]) -> str:
    """How much of a tree is here, and what becomes of the rest."""
    if "content_bytes" not in residency:
        return str(residency["problem"])
    size, here = residency["content_bytes"], residency["here_bytes"]
    parts = [f"all {format_size(size)} here" if here == size else f"{format_size(here)} of {format_size(size)} here"]
    if residency["state"] == "complete" and mode == "packfs":
        parts.append(
            "native at its next mount" if residency["native_next"] else "its packs hold content of others, too"
        )
    elif residency["state"] not in ("complete", "off"):
        parts.append(f"completion {residency['completion']}: {_STATES.get(residency['state'], residency['state'])}")
    if residency["pinned"]:
        parts.append("pinned")
    if residency["share_bytes"] is not None:
        parts.append(f"at most {format_size(residency['share_bytes'])} of the cache")
    if residency["problem"]:
        parts.append(str(residency["problem"]))
    return ", ".join(parts)


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


def _trust_text(trust: dict[str, Any]) -> str:
    if trust["error"]:
        return f"no key can be used: {trust['error']}"
    if not trust["keys"]:
        return "no trusted_keys: what the store holds is believed"
    return f"signed by one of {len(trust['keys'])}: " + ", ".join(key[:16] for key in trust["keys"])


def _packfs_text(packfs: dict[str, Any]) -> str:
    if not packfs["running"]:
        return str(packfs["state"])
    text = f"running, keeper {packfs['keeper_pid']}, worker {packfs.get('pid', '?')}"
    if packfs.get("version", floe.__version__) != floe.__version__:
        text += f" (still version {packfs['version']})"
    text += _ends_text(packfs)
    counters = packfs.get("counters") or {}
    if counters.get("profile_frames"):
        replayed = f"{counters['profile_frames']} frames ({format_size(counters['profile_bytes'])}) replayed"
        known = [counters.get(f"profile_{kind}_frames", 0) for kind in ("used", "unused")]
        used = ", {} of them read at the start and {} not".format(*known) if any(known) else ""  # known some time later
        text += f"; start-up profiles: {replayed}{used}"
    return text


def _ends_text(packfs: dict[str, Any]) -> str:
    """What an operator should know of workers that ended since the mount; empty when none did."""
    if not packfs.get("restarts"):
        return ""
    text = f"; workers that ended: {packfs['restarts']}"
    if packfs["silent_workers"]:
        text += f", {packfs['silent_workers']} of them killed because they did not answer"
    refused = packfs["poisonous_requests"], packfs["overdue_requests"]
    return text + (", requests given up: {} that ended workers, {} overdue".format(*refused) if any(refused) else "")


def _snapshotter_text(snapshotter: dict[str, Any]) -> str:
    if not snapshotter["running"]:
        return str(snapshotter["state"])
    counts = snapshotter.get("snapshots") or {}
    fallbacks = sum((snapshotter.get("fallbacks") or {}).values())
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    text = f"running, process {snapshotter.get('pid')}; snapshots: {shown}; layers unpacked instead: {fallbacks}"
    keys = len(snapshotter.get("trusted_keys") or ())
    return text + (f"; trusts {keys} key{'' if keys == 1 else 's'} and nothing else" if keys else "")
