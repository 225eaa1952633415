"""Samples of a node as floe.cli.live makes them, made up: many mounts, each with a frame map of its own."""

import time


def crowded_state(mounts):
    """A node with so many mounts, of images app-0, app-1 and so on."""
    trees = [_mount(number) for number in range(mounts)]
    return {
        "at": time.time(),
        "host": "node-1",
        "version": "0.1.0",
        "packfs": {"running": True, "state": "running", "pid": 7, "uptime": 60.0, "inflight": 3, "waiting": 3},
        "snapshotter": {"running": True, "state": "running", "pid": 8},
        "cache": {"held_bytes": 5 << 30, "limit_bytes": 90 << 30, "evicted_bytes": 0, "memory_bytes": 0, "queued": 0},
        "rates": {
            "seconds": 1.0,
            "sources": {
                name: {"requests": 10.0, "bytes": 1e7} for name in ("cache", "prefetched", "store", "readahead")
            },
            "reads": {"requests": 40.0, "bytes": 4e7},
            "hit_ratio": 0.5,
        },
        "mounts": trees,
        "named": [
            {"name": one["names"][0], "kind": "layer", "trees": 1, "shares_with": ["app-0"]}
            | {key: one[key] for key in ("content_bytes", "here_bytes", "shared_bytes")}
            for one in trees[:20]
        ],
        "starts": [
            {"key": f"k8s.io/1/{number}", "id": str(number), "name": f"app-{number}", "at": 1.7e9 + number}
            | {"first_read": 0.25, "last_read": 2.5, "reads": 9, "bytes": 1 << 20}
            for number in range(10)
        ],
        "examined": 1.7e9,
        "problems": [
            {"level": "error", "text": "pack 0123 is damaged in the store: 1 frames", "mend": "push the model again"},
            {"level": "warning", "text": "3 layers were unpacked instead: timeout", "mend": "floe doctor; floe trace"},
        ],
    }


def _mount(number):
    cells = 160
    here = (7 * number + 40) % (cells + 1)
    return {
        "tree": f"{number:064x}",
        "names": [f"app-{number}"],
        "kind": "layer",
        "mode": "packfs",
        "uses": 2,
        "content_bytes": 1 << 30,
        "here_bytes": (1 << 30) * here // cells,
        "state": "off",
        "pinned": number % 7 == 0,
        "shared_bytes": 1 << 20,
        "shares_with": [],
        "map": {
            "here": "9" * here + "0" * (cells - here),
            "touched": "5" * (here // 2) + "0" * (cells - here // 2),
            "ahead": "0" * (here // 2) + "4" * (here // 4) + "0" * (cells - here // 2 - here // 4),
            "pinned": ("1" if number % 7 == 0 else "0") * cells,
        },
    }
