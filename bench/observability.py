"""What it costs to look at a node: a scrape after the starts of 1,000 images, and the page of `floe ui` with 200 mounts.

    python -m bench.observability          # needs the packages of install/setup.sh test

Both are of this process: the scrape is a worker's status made up and served by floe.store.exposition, the page a sample made up and served
by floe.cli.ui_server, loaded by a headless Chromium until it shows all mounts. What the daemons take to answer is not in it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import browser
from support.livenode import crowded_state

from floe.cli.packfs_metrics import packfs_metrics
from floe.cli.ui_server import PageServer
from floe.fuse.starts import Starts
from floe.store.exposition import MetricsServer, read_metrics
from floe.store.recorder import Recorder

_TIMES = 9
_SHOWN = """
const done = arguments[arguments.length - 1];
const look = () => document.body.dataset.samples ? done([performance.now(), document.querySelectorAll("#trees tbody tr").length]) : setTimeout(look, 5);
look();
"""


class _Events:
    def add(self, kind: str, **fields: object) -> None:
        pass


class _Crowd:
    def sample(self) -> dict:
        return crowded_state(200)

    def timeline(self, _key: str, _at: float) -> None:
        return None


def scrape(images: int) -> dict[str, float]:
    """Milliseconds and bytes of a scrape after the starts of so many images."""
    recorder = Recorder()
    starts = Starts(recorder, _Events(), lambda tree: [tree], dict)
    for number in range(images):
        recording = recorder.follow(f"key-{number}", ["p"])
        recorder.packs["p"] and recorder.note("p", 0, 4096)
        starts._tell(_Start(recording, f"registry.example/app-{number}:1"), {})  # noqa: SLF001 - without the seconds it waits
        recorder.unfollow(recording)
    status = {"starts": starts.status(), "counters": {}}
    with tempfile.TemporaryDirectory() as folder:
        server = MetricsServer(f"unix:{folder}/m.sock", lambda: packfs_metrics(status))
        try:
            took, text = [], ""
            for _ in range(_TIMES):
                began = time.perf_counter()
                text = read_metrics(server.address)
                took.append(time.perf_counter() - began)
        finally:
            server.close()
    return {"images": images, "median_ms": round(1e3 * statistics.median(took), 1), "bytes": len(text)}


class _Start:
    def __init__(self, recording: object, name: str) -> None:
        self.recording, self.name, self.trees, self.key, self.at = recording, name, ["t"], "k", 1.0
        self.trace: dict[str, str] = {}


def page() -> dict[str, float]:
    """Milliseconds from the beginning of the navigation until all mounts are shown, each time in the same browser without cache."""
    server = PageServer("127.0.0.1", 0, _Crowd(), lambda found: found)
    threading.Thread(target=server.serve, daemon=True).start()
    took = []
    with tempfile.TemporaryDirectory() as profile, browser.browser(profile) as driver:
        for _ in range(_TIMES):
            driver.get(f"http://127.0.0.1:{server.port}/")
            milliseconds, rows = driver.execute_async_script(_SHOWN)
            assert rows == 200, rows
            took.append(milliseconds)
    server.close()
    return {"mounts": 200, "median_ms": round(statistics.median(took)), "worst_ms": round(max(took))}


if __name__ == "__main__":
    print(json.dumps({"scrape": [scrape(10), scrape(1000)], "page": page()}, indent=2))
