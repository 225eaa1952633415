"""What the pack filesystem's worker counts, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from floe.cli.packfs_timings import timings
from floe.store.exposition import COUNTER, GAUGE, Metric

_SOURCES = ("cache", "prefetched", "store", "readahead")
_REQUESTS = (
    "Reads that node cache and prefetched memory answered; ranged GETs to the object store, those for read-ahead."
)
_BYTES = "Bytes by source: node cache, prefetched memory, object store (as stored), read-ahead."
# By the reader's counter: the event, under which floe_packfs_events_total shows it.
_EVENTS = {
    "transit_damage": "damaged_in_transit",
    "damaged": "damaged_at_rest",
    "deadlines": "deadline",
    "cancelled": "cancelled",
    "failed_reads": "failed_read",
    "store_errors": "store_error",
    "kept_damaged_frames": "damaged_in_cache",
    "kept_write_errors": "cache_write_error",
    "kept_read_errors": "cache_read_error",
    "kept_bypassed_frames": "cache_bypassed",
    "skipped_frames": "cache_too_slow",
    "around_returned": "bypass_returned",
}
# By the key of the worker's status: metric, kind and help.
_STATUS = {
    "mounts": ("floe_mounts", GAUGE, "Trees mounted on this node."),
    "uptime": ("floe_packfs_uptime_seconds", GAUGE, "Since this worker's start."),
    "rss": ("floe_packfs_resident_peak_bytes", GAUGE, "The worker's resident memory at its peak."),
    "packs": ("floe_packfs_packs", GAUGE, "Packs met since the pack filesystem was mounted."),
    "inflight": ("floe_packfs_inflight_reads", GAUGE, "Reads taken from the kernel and not yet answered."),
    "waiting": (
        "floe_packfs_waiting_requests",
        GAUGE,
        "Requests that the kernel has no answer to, those among them that no thread has taken yet.",
    ),
    "cache_limit_bytes": ("floe_cache_limit_bytes", GAUGE, "What the node cache may hold at most."),
    "pinned_packs": ("floe_cache_pinned_packs", GAUGE, "Packs that are pinned: by native mounts, or by policy."),
    "requests": ("floe_packfs_kernel_requests", COUNTER, "FUSE requests of any kind."),
    "reads": ("floe_packfs_kernel_reads", COUNTER, "FUSE READ requests."),
    "read_bytes": ("floe_packfs_kernel_read_bytes", COUNTER, "Bytes answered to FUSE READ requests."),
    "errors": ("floe_packfs_kernel_errors", COUNTER, "FUSE requests answered with an error."),
    "workers": ("floe_packfs_workers", COUNTER, "Workers since the pack filesystem was mounted, this one included."),
    "takeovers": ("floe_packfs_takeovers", COUNTER, "Workers that found requests which their predecessor had left."),
    "restarts": ("floe_packfs_worker_deaths", COUNTER, "Workers that ended without having been told to."),
    "silent_workers": (
        "floe_packfs_silent_workers",
        COUNTER,
        "Of these, workers that were killed because they did not answer.",
    ),
    "poisonous_requests": (
        "floe_packfs_poisonous_requests",
        COUNTER,
        "Requests that ended workers again and again, answered with an error.",
    ),
    "overdue_requests": (
        "floe_packfs_overdue_requests",
        COUNTER,
        "Requests that a worker did not answer in time, answered with an error by its successor.",
    ),
    "replayed": ("floe_packfs_replayed_requests", COUNTER, "Requests of dead workers that their successors answered."),
}
# By the reader's counter.
_COUNTERS = {
    "memory_bytes": ("floe_packfs_fetch_memory_bytes", GAUGE, "Memory held by data on its way."),
    "memory_waiting": ("floe_packfs_queued_reads", GAUGE, "Reads that wait for memory (fetch_memory)."),
    "profiles_found": ("floe_profiles_found", COUNTER, "Trees whose start-up profile was replayed."),
    "profiles_recorded": ("floe_profiles_recorded", COUNTER, "Starts of trees that were recorded."),
    "profiles_published": ("floe_profiles_published", COUNTER, "Recordings that changed a profile in the store."),
    "profile_frames": ("floe_profile_replayed_frames", COUNTER, "Frames fetched for start-up profiles."),
    "profile_bytes": ("floe_profile_replayed_bytes", COUNTER, "Content fetched for start-up profiles."),
    "profile_used_frames": ("floe_profile_used_frames", COUNTER, "Of these, frames that the start read."),
    "profile_unused_frames": ("floe_profile_unused_frames", COUNTER, "Of these, frames that it did not read."),
    "completion_requests": ("floe_completion_requests", COUNTER, "Requests of background completion."),
    "completion_bytes": ("floe_completion_bytes", COUNTER, "Bytes that they asked the object store for, as stored."),
    "completion_failures": ("floe_completion_failures", COUNTER, "Such requests that brought nothing."),
    "front_frames": (
        "floe_front_frames",
        COUNTER,
        "Frames of models fetched without a profile, at their image's pull.",
    ),
    "front_bytes": ("floe_front_bytes", COUNTER, "Their content."),
    "kept_held_bytes": ("floe_cache_held_bytes", GAUGE, "Pack content in the node cache."),
    "kept_stored_bytes": ("floe_cache_stored_bytes", COUNTER, "Pack content written to the node cache."),
    "around_reads": ("floe_cache_bypassed_reads", COUNTER, "Reads that asked the store instead of a slow cache disk."),
    "kept_evicted_bytes": ("floe_cache_evicted_bytes", COUNTER, "Pack content evicted from the node cache."),
}


def packfs_metrics(status: Mapping[str, Any]) -> Iterable[Metric]:
    """Metrics out of a worker's `status` (see fuse/worker.py) with `mounts` added; what it lacks, or has None for, is left out."""
    counters: Mapping[str, float] = status.get("counters", {})

    def by_source(unit: str) -> dict[tuple[str, ...], float]:
        return {(source,): counters[f"{source}_{unit}"] for source in _SOURCES if f"{source}_{unit}" in counters}

    yield Metric("floe_requests", _REQUESTS, COUNTER, ("source",), by_source("requests"))
    yield Metric("floe_bytes", _BYTES, COUNTER, ("source",), by_source("bytes"))
    yield from timings(status)
    states: dict[tuple[str, ...], float] = {
        (state,): count for state, count in (status.get("completion") or {}).items()
    }
    yield Metric("floe_completion_trees", "Mounted trees by the state of their completion.", GAUGE, ("state",), states)
    yield from _directories(status.get("cache") or ())
    damaged: dict[tuple[str, ...], float] = {
        (pack["pack"],): len(pack["frames"]) for pack in status.get("damaged") or ()
    }
    yield Metric("floe_packfs_damaged_frames", "Frames found damaged in the store, by pack.", GAUGE, ("pack",), damaged)
    events: dict[tuple[str, ...], float] = {
        (event,): counters[key] for key, event in _EVENTS.items() if key in counters
    }
    yield Metric("floe_packfs_events", "What went wrong or was given up.", COUNTER, ("event",), events)
    for source, table in ((status, _STATUS), (counters, _COUNTERS)):
        for key, (name, kind, text) in table.items():
            if key in source and source[key] is not None:  # None: it cannot be read just now
                yield Metric(name, text, kind, (), {(): source[key]})


def _directories(disks: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
    """Of each directory of the node cache; see CacheWriter.disks."""
    states: dict[tuple[str, ...], float] = {}
    held: dict[tuple[str, ...], float] = {}
    bypassed: dict[tuple[str, ...], float] = {}
    costs: dict[tuple[str, ...], float] = {}
    for disk in disks:
        path = disk["path"]
        states.update({(path, state): float(state == disk["state"]) for state in ("ok", "full", "left out")})
        held[path,] = disk["held_bytes"]
        judged = disk.get("bypass")
        if judged is not None:
            bypassed[path,] = float(judged["bypassed"])
            for source in ("hit", "miss"):
                costs.update({(path, source, size): took for size, took in judged[f"{source}_seconds"].items()})
    by_directory = ("directory",)
    yield Metric(
        "floe_cache_directory_state", "1 for the state of a cache directory.", GAUGE, ("directory", "state"), states
    )
    yield Metric("floe_cache_directory_held_bytes", "Pack content in a cache directory.", GAUGE, by_directory, held)
    text = "1 while reads go around the directory's disk, to the store."
    yield Metric("floe_cache_directory_bypassed", text, GAUGE, by_directory, bypassed)
    text = "Median time of a read that waits for the directory's disk (hit), or for the store (miss), by its bytes."
    yield Metric("floe_cache_read_seconds", text, GAUGE, ("directory", "source", "bytes"), costs)
