"""python -m bench: Floe against native file systems, JuiceFS and plain ranged GETs, in interleaved rounds of one run.

With --local only what needs no server: native ext4 and EROFS, Floe resident, through FUSE and portable, on a store in a folder.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import command, data, native, workloads
from bench.floe_node import FloeNode
from bench.report import Results

MIB = 1 << 20
FUSE, RESIDENT, PORTABLE, COLD = "floe over fuse", "floe resident", "floe portable", "floe cold"
JUICE, GETS = "juicefs", "ranged GETs"


def main() -> int:
    """Make the data, mount every subject, measure, print."""
    options = _options()
    with command.folder(options.dir) as work:
        results = _measure(work, options)
    if options.plot:
        from bench.plot import draw  # noqa: PLC0415 - its library is wanted here alone

        draw(results.as_json(), options.plot)
    command.show(options, results.as_json(), results.as_text())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local", action="store_true", help="only what needs no server")
    parser.add_argument("--size", type=int, default=1024, help="size of the large file in MiB (default 1024)")
    parser.add_argument("--files", type=int, default=20_000, help="number of small files (default 20000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each workload (default 7)")
    parser.add_argument("--first-rounds", type=int, default=3, help="rounds of first reads from the bucket (default 3)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only workloads with this in their names")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where to work; a real disk, 20 GiB free")
    parser.add_argument("--output", type=Path, help="write JSON to this file too, e.g. bench/results/first.json")
    parser.add_argument("--plot", type=Path, help="draw the medians into this file (.svg or .png)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    return options


def _measure(work: Path, options: argparse.Namespace) -> Results:
    source = work / "data"
    command.say("making the data")
    data.make(source, large=options.size * MIB, files=options.files)
    size = data.size(source)
    results = Results(facts=_facts(options, size))
    with ExitStack() as stack:
        folders = {
            "ext4": stack.enter_context(native.ext4(work, source, size)),
            "native erofs": stack.enter_context(native.erofs(work, source)),
        }
        if options.local:
            _add_floe(stack, work, source, {"FLOE_STORE": f"file://{work}/store"}, folders, results)
            _rounds(results, folders, options)
        else:
            _with_peers(stack, work, source, folders, results, options)
    return results


def _add_floe(
    stack: ExitStack,
    work: Path,
    source: Path,
    store: dict[str, str],
    folders: dict[str, Path],
    results: Results,
) -> None:
    """Push the data to `store`; mount it on a node through FUSE, on one natively, on one portably, all caches full."""
    fuse, resident, portable = (FloeNode(work, name, store) for name in ("fuse", "resident", "portable"))
    command.say("floe model push")
    fuse.push(source)
    # Mounted while its packs are not in the node cache, this mount stays on FUSE when they are.
    folders[FUSE] = stack.enter_context(fuse.mounted())
    command.say("filling the node caches")
    _read_all(folders[FUSE])
    with resident.mounted() as folder:
        _read_all(folder)
    folders[RESIDENT] = stack.enter_context(resident.mounted())
    modes = (fuse.mode(), resident.mode())
    if modes != ("packfs", "native"):
        raise SystemExit(f"bench: the trees are mounted as {modes}, not as packfs and native")
    folders[PORTABLE] = stack.enter_context(portable.mounted("--portable"))
    _read_all(folders[PORTABLE])
    stack.callback(lambda: results.facts.update(_memory(fuse)))


def _with_peers(
    stack: ExitStack,
    work: Path,
    source: Path,
    folders: dict[str, Path],
    results: Results,
    options: argparse.Namespace,
) -> None:
    from bench import peers, servers  # noqa: PLC0415 - --local needs neither their programs nor their packages

    s3 = stack.enter_context(servers.s3(work))
    store = {**s3.environment(), "FLOE_STORE": s3.url(s3.bucket(), "bench")}
    _add_floe(stack, work, source, store, folders, results)
    redis = stack.enter_context(servers.redis(work))
    juice = peers.JuiceFS(work, redis, f"{s3.endpoint}/{s3.bucket()}", servers.KEYS)
    stack.callback(juice.umount)
    juice.mount()
    command.say("copying the data into JuiceFS")
    juice.fill(source)
    _read_all(juice.mountpoint)
    _rounds(results, {**folders, JUICE: juice.mountpoint}, options)

    cold = FloeNode(work, "cold", store)
    stack.callback(cold.umount)
    gets = peers.RangedGets(work, peers.s3_config(s3.bucket(), s3.endpoint, servers.KEYS))
    gets.put("large.bin", source / "large.bin")
    mounts: dict[str, list[float]] = {COLD: [], JUICE: []}
    for title, workload in workloads.FIRST_READS.items():
        if options.only not in title:
            continue

        def first(node: FloeNode | peers.JuiceFS, name: str, read: Callable[[Path], float] = workload) -> float:
            mounts[name].append(node.cold_mount())
            workloads.empty_page_cache()
            return read(node.mountpoint)

        def after_emptying(run: Callable[[], float]) -> float:
            workloads.empty_page_cache()
            return run()

        runs: dict[str, Callable[[], float]] = {
            "native erofs": partial(after_emptying, partial(workload, folders["native erofs"])),
            COLD: partial(first, cold, COLD),
            JUICE: partial(first, juice, JUICE),
        }
        if title.endswith(workloads.LARGE):
            runs[GETS] = partial(after_emptying, partial(gets.fetch, "large.bin"))
        command.say(f"{title}: {', '.join(runs)}")
        runs["native erofs"]()
        results.measure(title, options.first_rounds, lambda runs=runs: {name: run() for name, run in runs.items()})
    results.facts["mounting with an empty cache, seconds"] = {
        name: [round(second, 3) for second in seconds] for name, seconds in mounts.items()
    }


def _rounds(results: Results, folders: dict[str, Path], options: argparse.Namespace) -> None:
    for title, workload in workloads.WORKLOADS.items():
        if options.only not in title:
            continue
        for folder in folders.values():
            workload(folder)  # brings every backing file into the page cache, for all alike
        command.say(f"{title}: {', '.join(folders)}")
        # Subjects take turns within a round, so that a slow minute of the machine hits all of them.
        results.measure(title, options.rounds, partial(_one_round, workload, folders))


def _one_round(workload: Callable[[Path], float], folders: dict[str, Path]) -> dict[str, float]:
    return {name: workload(folder) for name, folder in folders.items()}


def _read_all(folder: Path) -> None:
    workloads.read_large(folder)
    workloads.read_small(folder)


def _memory(node: FloeNode) -> dict[str, float]:
    return {f"{name} peak MiB": round(node.peak_memory(name) / MIB, 1) for name in ("keeper", "worker")}


def _facts(options: argparse.Namespace, size: int) -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "large file MiB": options.size,
        "small files": options.files,
        "bytes in all": size,
        "page cache": "dropped before each run for the files read, their backing files in it; cold and first: all of it dropped",
    }


if __name__ == "__main__":
    sys.exit(main())
