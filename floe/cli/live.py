"""A node as it is right now, for `floe ui` and `floe top`: what is mounted and how much of it is here, rates, starts, problems.

Everything comes from the daemons' sockets, the mount table and the node cache, as for `floe status`; nothing is written.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cachetools import LRUCache

import floe
from floe.cli import node, trace
from floe.cli.examined import Examined
from floe.cli.framecells import Cells, cells_of
from floe.cli.problems import problems
from floe.cli.settings import Settings
from floe.cli.sharing import Sharing
from floe.cli.timeline import Start, Timeline, starts
from floe.protos.packfs_control import PackfsClient
from floe.store.cache import Cache, open_cache
from floe.store.erofs import read_device_table
from floe.store.errors import FloeError
from floe.store.eventlog import FOLDER, read_events

SOURCES = ("cache", "prefetched", "store", "readahead")
STARTS = 10  # the last ones
_CELLS_MOST = 64 << 10  # of a whole sample; a page must load soon on a node with many mounts
_SLOWLY = 15.0  # seconds between two looks at what takes long: the index, the disk
_TREES = 4096  # whose packs are remembered


class Live:
    """Samples of a node; rates are those between two samples. Thread-safe."""

    def __init__(self, settings: Settings, examined: Examined | None = None) -> None:
        """`examined`: what the doctor finds is among the problems, too."""
        self._settings = settings
        self._examined = examined
        self._lock = threading.Lock()
        self._before: tuple[float, Mapping[str, Any]] | None = None
        self._packs: LRUCache[str, tuple[str, ...]] = LRUCache(_TREES)
        self._sharing = Sharing()
        self._slow: dict[str, Any] = {}
        self._slow_at = -_SLOWLY
        self._slow_look: threading.Thread | None = None
        self._events: list[dict[str, Any]] = []
        self._starts: list[Start] = []
        self._events_of: tuple[tuple[int, int], ...] = ()

    def sample(self, *, patient: bool = False) -> dict[str, Any]:
        """The node now; sizes in bytes, rates a second. `patient`: wait for what takes long rather than leave it out at first."""
        with self._lock:
            return self._sample(patient=patient)

    def start(self, key: str, at: float) -> tuple[list[dict[str, Any]], Start | None]:
        """The events, and the start of `key` (see timeline.Start) that began at `at`; None: not known any more."""
        with self._lock:
            events, known = self._read_events(), self._starts
        return events, next((one for one in known if one.key == key and one.at == at), None)

    def _sample(self, *, patient: bool) -> dict[str, Any]:
        settings = self._settings
        packfs = node.packfs_status(settings)
        now = time.monotonic()
        slow = self._look_slowly(patient=patient)
        snapshotter = node.snapshotter_status(settings.run_dir)
        residency, damaged = packfs.pop("residency", {}), packfs.pop("damaged", [])
        mounts = [{**mount, "residency": residency.get(mount["tree"])} for mount in node.tree_mounts(settings.run_dir)]
        events = self._read_events()
        shown = self._mounts(mounts, _names(events, mounts), patient=patient)
        wrong = {**slow, "packfs": packfs, "snapshotter": snapshotter, "mounts": mounts, "damaged": damaged}
        judged = {disk["path"]: disk for disk in packfs.get("cache") or ()}
        if "cache" in slow:
            directories = [{**one, **judged.get(one["path"], {})} for one in slow["cache"]["directories"]]
            wrong["cache"] = {**slow["cache"], "directories": directories}
        found = problems(wrong) + (self._examined.problems() if self._examined else [])
        return {
            "at": time.time(),
            "host": platform.node(),
            "version": floe.__version__,
            "packfs": {key: packfs.get(key) for key in ("running", "state", "pid", "uptime", "inflight", "waiting")},
            "snapshotter": {key: snapshotter.get(key) for key in ("running", "state", "pid")},
            "cache": _cache(packfs),
            "rates": self._rates(now, packfs),
            "mounts": shown,
            "named": _named(shown),
            "starts": [_start(one) for one in reversed(self._starts[-STARTS:])],
            "problems": [problem._asdict() for problem in sorted(found, key=lambda one: one.level != "error")],
            "examined": self._examined.at if self._examined else None,
        }

    def _rates(self, now: float, packfs: Mapping[str, Any]) -> dict[str, Any]:
        """Requests and bytes a second by source since the last sample, None without one; and the hit ratio since then."""
        counters = {
            **(packfs.get("counters") or {}),
            **{f"kernel_{k}": packfs.get(k, 0) for k in ("reads", "read_bytes")},
        }
        before, self._before = self._before, (now, {**counters, "pid": packfs.get("pid")})
        found: dict[str, Any] = {"seconds": None, "sources": {}, "hit_ratio": None}
        if not packfs["running"] or before is None or before[1]["pid"] != packfs.get("pid") or now <= before[0]:
            return found  # the first, or of a new worker, which counts anew
        seconds = now - before[0]

        def grown(key: str) -> float:
            return max(0.0, float(counters.get(key, 0)) - float(before[1].get(key, 0)))

        requests = {source: grown(f"{source}_requests") for source in SOURCES}
        found["seconds"] = seconds
        found["sources"] = {
            source: {"requests": requests[source] / seconds, "bytes": grown(f"{source}_bytes") / seconds}
            for source in SOURCES
        }
        found["reads"] = {"requests": grown("kernel_reads") / seconds, "bytes": grown("kernel_read_bytes") / seconds}
        if whole := sum(requests.values()):
            found["hit_ratio"] = (requests["cache"] + requests["prefetched"]) / whole
        return found

    def _look_slowly(self, *, patient: bool) -> dict[str, Any]:
        """The index and the cache's disk as of the last look, and a new one begun when it is time."""
        if time.monotonic() - self._slow_at >= _SLOWLY:
            self._slow_at = time.monotonic()
            self._slow_look = threading.Thread(target=self._slow_run, name="floe-look", daemon=True)
            self._slow_look.start()
        if patient and self._slow_look is not None:
            self._slow_look.join()
        return self._slow

    def _slow_run(self) -> None:
        found: dict[str, Any] = {}
        with suppress(FloeError, OSError):
            found["index"] = node.index_status(self._settings)
        with suppress(FloeError, OSError):
            found["cache"] = node.cache_status(self._settings)
        with suppress(FloeError, OSError):
            found["stuck_processes"] = node.stuck_processes(self._settings.run_dir)
        self._slow = found

    def _read_events(self) -> list[dict[str, Any]]:
        """The node's events, and of them the starts; read again only when there are new ones."""
        folder = self._settings.run_dir / FOLDER
        with suppress(OSError):  # gone, or another user's: no starts are known then
            now = tuple((stat.st_ino, stat.st_size) for path in sorted(folder.iterdir()) if (stat := path.stat()))
            if now != self._events_of:
                self._events = read_events(self._settings.run_dir)
                self._starts = starts(self._events)
                self._events_of = now
        return self._events

    def _mounts(
        self, mounts: Sequence[Mapping[str, Any]], names: Mapping[str, Sequence[str]], *, patient: bool
    ) -> list[dict[str, Any]]:
        """Each mounted tree with its frame map; the newest names first."""
        roots = [root for root in self._settings.cache_roots if root.is_dir()]
        cache = None
        with suppress(FloeError, OSError):
            cache = open_cache(roots) if roots else None
        packs = {mount["tree"]: self._packs_of(cache, mount["tree"]) for mount in mounts}
        maps: dict[str, dict[str, Any]] = {}
        with suppress(FloeError):
            maps = PackfsClient(self._settings.run_dir).frames(dict.fromkeys(p for of in packs.values() for p in of))
        shared = self._sharing.of(packs, maps, cache.tree_path if cache else lambda _tree: None, patient=patient)
        cells = max(16, min(160, _CELLS_MOST // max(1, len(mounts))))
        found = []
        for mount in mounts:
            tree, residency = mount["tree"], mount["residency"] or {}
            known = [maps[pack_id] for pack_id in packs[tree] if pack_id in maps]
            found.append(
                {
                    "tree": tree,
                    "names": list(names.get(tree, ())),
                    "kind": "model" if mount["models"] or residency.get("model") else "layer",
                    "mode": mount["mode"],
                    "uses": len(mount["uses"]),
                    "content_bytes": residency.get("content_bytes"),
                    "here_bytes": residency.get("here_bytes"),
                    "state": residency.get("state"),
                    "pinned": bool(residency.get("pinned")) or any(one["pinned"] for one in known),
                    "shared_bytes": shared[tree].bytes,
                    "shares_with": list(shared[tree].trees[:8]),
                    "map": (cells_of(known, cells) if known else Cells())._asdict(),
                }
            )
        return sorted(found, key=lambda one: (not one["names"], one["names"], one["tree"]))

    def _packs_of(self, cache: Cache | None, tree: str) -> tuple[str, ...]:
        if tree not in self._packs:
            path = cache.tree_path(tree) if cache is not None else None
            if path is None:
                return ()
            try:
                self._packs[tree] = tuple(pack_id for pack_id, _ in read_device_table(path))
            except (FloeError, OSError):
                return ()
        return self._packs[tree]

    def timeline(self, key: str, at: float) -> Timeline | None:
        """The Timeline of a start, its files named; None when it is not known any more."""
        events, start = self.start(key, at)
        return None if start is None else trace.trace(self._settings, events, start)


def _names(events: Sequence[Mapping[str, Any]], mounts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By tree, what it is called: models as they were mounted, images as the last events call them."""
    found: dict[str, dict[str, None]] = {}
    for mount in mounts:
        names = found.setdefault(mount["tree"], {})
        names.update(dict.fromkeys(mount["models"].values()))
        model = (mount["residency"] or {}).get("model")
        if model and not any(name.partition(":")[0] == model for name in names):
            names[model] = None
    for event in events:
        name = str(event.get("name") or event.get("image") or "")
        trees = (
            [*(event.get("trees") or ()), event.get("tree")] if event["kind"] in ("prepare", "begun", "start") else ()
        )
        for tree in trees:
            if name and tree in found:
                found[tree][name] = None
    return {tree: list(names)[:8] for tree, names in found.items()}


def _named(mounts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Images and models by name: their trees, bytes and what of them others use, too."""
    names = sorted({name for mount in mounts for name in mount["names"]})
    found = []
    for name in names:
        ours = [mount for mount in mounts if name in mount["names"]]
        trees = {mount["tree"] for mount in ours}
        others = {other for mount in mounts for other in mount["names"] if other != name}
        beside = {
            other
            for mount in mounts
            for other in mount["names"]
            if other in others and (mount["tree"] in trees or any(tree in mount["shares_with"] for tree in trees))
        }
        found.append(
            {
                "name": name,
                "kind": ours[0]["kind"] if len({mount["kind"] for mount in ours}) == 1 else "image",
                "trees": len(ours),
                "content_bytes": sum(mount["content_bytes"] or 0 for mount in ours),
                "here_bytes": sum(mount["here_bytes"] or 0 for mount in ours),
                "shared_bytes": _shared(ours),
                "shares_with": sorted(beside)[:8],
            }
        )
    return found


def _shared(mounts: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes of what is mounted under one name that others use; None while that is found out."""
    found = 0
    for mount in mounts:
        whole = mount["content_bytes"] or 0
        if mount["shared_bytes"] is None and len(mount["names"]) < 2:
            return None
        found += whole if len(mount["names"]) > 1 else min(mount["shared_bytes"], whole)
    return found


def _cache(packfs: Mapping[str, Any]) -> dict[str, Any]:
    counters = packfs.get("counters") or {}
    return {
        "held_bytes": counters.get("kept_held_bytes"),
        "limit_bytes": packfs.get("cache_limit_bytes"),
        "evicted_bytes": counters.get("kept_evicted_bytes"),
        "memory_bytes": counters.get("memory_bytes"),
        "queued": counters.get("memory_waiting"),
    }


def _start(start: Start) -> dict[str, Any]:
    end = start.end or {}
    return {
        "key": start.key,
        "id": start.id,
        "name": start.name or None,
        "at": start.at,
        "first_read": end.get("first_read"),
        "last_read": end.get("last_read"),
        "reads": end.get("reads"),
        "bytes": end.get("bytes"),
    }
