"""`floe agent`: the daemon by which nodes and operators know of each other."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import floe
from floe.cli import node, seed
from floe.cli.context import make_directory, open_cache, open_catalog
from floe.cli.options import SIGNING, Commands, add_command, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import FloeError, PreconditionError

if TYPE_CHECKING:
    from floe.agent.duties import Duty

AGENT_KEYS = ("node_name", "node_labels", "heartbeat", "warm_budget")
_SLOW_FACTS = 30.0  # seconds for which what takes a look at the disk is believed
_VERSIONS = 600.0  # seconds, likewise, for another program's version


def add_parser(commands: Commands) -> None:
    """Add `floe agent`."""
    text = "Run the node's agent in the foreground: heartbeats and warm orders through the index."
    parser = add_command(commands, "agent", text, run)
    parser.add_argument(
        "--wanted", action="store_true", help="only say, by exit status 0 or 1, whether this node has a fleet"
    )
    add_settings(parser, *AGENT_KEYS, *seed.SETTINGS, "spool_dir", *SIGNING)
    add_settings(parser, "agent_metrics", aliases=("--metrics",))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    settings = settings_of(args, daemon=True)
    if args.wanted:
        return 0 if settings.index.startswith("redis") else 1
    if settings.index == "none":
        raise PreconditionError(
            "an agent needs an index, and there is none", hint="set index to redis://... or sqlite:..."
        )
    from floe.agent.daemon import AgentConfig, serve  # noqa: PLC0415 - lazy: keeps --help fast

    make_directory(settings.run_dir, "run directory", "--run-dir", 0o755)
    cache = open_cache(settings, required=False)
    config = AgentConfig(
        run_dir=settings.run_dir,
        node=settings.node,
        labels=settings.node_labels.by_key,
        interval=settings.heartbeat,
        budget=settings.warm_budget.of(cache.size or 0),
        metrics_address=settings.metrics("agent"),
    )
    if settings.seed != "off":
        seed.gently()
    with open_catalog(settings) as catalog:
        return serve(config, catalog, cache, Facts(settings), _more(settings))


def _more(settings: Settings) -> list[Duty]:
    """What an agent does where the settings ask for it."""
    if settings.seed == "off":
        return []
    from floe.seeding.duty import Seeding  # noqa: PLC0415 - lazy: keeps --help fast

    return [Seeding(lambda: seed.opened(settings))]


class Facts:
    """What this node's heartbeats say; see Heartbeat."""

    def __init__(self, settings: Settings) -> None:
        from floe.agent.holdings import Holdings  # noqa: PLC0415 - lazy: keeps --help fast
        from floe.agent.pins import WarmPins  # noqa: PLC0415 - likewise

        self._settings = settings
        self._cache = open_cache(settings, required=False)
        self._holdings = Holdings(self._cache)
        self._pins = WarmPins(self._cache, 0)
        self._slow = _Kept(_SLOW_FACTS, self._look)
        self._containerd = _Kept(_VERSIONS, _containerd_version)

    def __call__(self) -> dict[str, Any]:
        """Ask the daemons; waits for a few seconds at the most."""
        packfs = node.packfs_status(self._settings)
        snapshotter = node.snapshotter_status(self._settings.run_dir)
        versions = {"floe": floe.__version__, "kernel": os.uname().release, "containerd": self._containerd()}
        for name, found in (("packfs", packfs), ("snapshotter", snapshotter)):
            if found.get("version"):
                versions[name] = str(found["version"])
        return {
            "versions": versions,
            "health": {"packfs": str(packfs["state"]), "snapshotter": str(snapshotter["state"])},
            "mounted": [
                {"tree": tree, **{key: said.get(key) for key in ("model", "state", "here_bytes", "content_bytes")}}
                for tree, said in packfs.get("residency", {}).items()
            ],
            **self._slow(),
        }

    def _look(self) -> dict[str, Any]:
        from floe.agent.beating import TREES_MAX  # noqa: PLC0415 - lazy: keeps --help fast

        cache = node.cache_status(self._settings)
        keys = ("size_bytes", "used_bytes", "disk_free_bytes", "packs", "complete_packs", "pinned_packs")
        problems = [str(d["disk_problem"]) for d in cache["directories"] if d.get("disk_problem")]
        found = {key: cache[key] for key in keys if key in cache}
        return {
            "cache": {**found, "problem": "; ".join(problems)},
            "trees": self._holdings.trees(TREES_MAX),
            "pins": self._pins.listed(),
        }


class _Kept:
    """What a call answered, for so many seconds."""

    def __init__(self, seconds: float, call: Callable[[], Any]) -> None:
        self._seconds = seconds
        self._call = call
        self._until = 0.0
        self._value: Any = None

    def __call__(self) -> Any:
        if time.monotonic() >= self._until:
            self._value = self._call()
            self._until = time.monotonic() + self._seconds
        return self._value


def _containerd_version() -> str:
    from floe.containerd.version import detect, find_binary  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        return str(detect(find_binary(None), None))
    except FloeError:
        return ""
