"""python -m bench: Floe against native ext4 and EROFS, interleaved rounds in one run."""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench import data, subjects, workloads
from bench.report import Results

MIB = 1 << 20


def main() -> int:
    """Make the data, mount every subject, measure, print."""
    options = _options()
    work = Path(tempfile.mkdtemp(prefix="floe-bench-", dir=options.dir))
    try:
        results = _measure(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    print(json.dumps(results.as_json(), indent=1) if options.json else results.as_text())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="size of the large file in MiB (default 1024)")
    parser.add_argument("--files", type=int, default=20_000, help="number of small files (default 20000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per workload (default 7)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where to work; a real disk, not tmpfs")
    parser.add_argument("--output", type=Path, help="write JSON to this file too, e.g. bench/results/first.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    return options


def _measure(work: Path, options: argparse.Namespace) -> Results:
    source = work / "data"
    _say("making the data")
    data.make(source, large=options.size * MIB, files=options.files)
    size = data.size(source)
    node = subjects.FloeNode(work)
    node.floe("model", "push", source, "bench")
    results = Results(facts=_facts(options, size))
    with ExitStack() as stack:
        # Mounted while its packs are not in the node cache, this mount stays on FUSE when they are.
        through_fuse = stack.enter_context(node.mounted("bench", work / "mnt-fuse"))
        _say("filling the node cache through FUSE")
        results.facts["first read of all, from the store, seconds"] = round(
            workloads.read_large(through_fuse) + workloads.read_small(through_fuse), 3
        )
        folders = {
            "ext4": stack.enter_context(subjects.ext4(work, source, size)),
            "native erofs": stack.enter_context(subjects.native_erofs(work, source)),
            "floe over fuse": through_fuse,
        }
        _rounds(results, folders, options.rounds)
        results.facts["keeper peak MiB"] = round(node.peak_memory("keeper") / MIB, 1)
        results.facts["worker peak MiB"] = round(node.peak_memory("worker") / MIB, 1)
    # Every pack is complete now: the next mount is native.
    with ExitStack() as stack:
        folders = {
            "ext4": stack.enter_context(subjects.ext4(work / "second", source, size)),
            "native erofs": stack.enter_context(subjects.native_erofs(work / "second", source)),
            "floe resident": stack.enter_context(node.mounted("bench", work / "mnt-native")),
        }
        _rounds(results, folders, options.rounds)
    return results


def _rounds(results: Results, folders: dict[str, Path], rounds: int) -> None:
    for title, workload in workloads.WORKLOADS.items():
        for folder in folders.values():
            workload(folder)  # brings every backing file into the page cache, for all alike
        _say(f"{title}: {', '.join(folders)}")
        # Subjects take turns within a round, so that a slow minute of the machine hits all of them.
        measured = [{name: workload(folder) for name, folder in folders.items()} for _ in range(rounds)]
        label = f"{title} ({list(folders)[-1]})"
        results.add_rounds(label, measured)


def _facts(options: argparse.Namespace, size: int) -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "large file MiB": options.size,
        "small files": options.files,
        "bytes in all": size,
        "page cache": "dropped before each run for the files read; where it says cold, everything is dropped",
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"bench: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
