"""What `floe bench` prints: figures by part, and the sentence that names the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.sizes import format_size

if TYPE_CHECKING:
    from floe.selfbench.bench import Results
    from floe.selfbench.figures import Cpu, Disk, Mount, Network, Store, Upload
    from floe.selfbench.plan import Plan
    from floe.selfbench.verdict import Verdict

_Pairs = Iterator[tuple[str, str]]


def show(plan: Plan, results: Results, *, as_json: bool) -> None:
    """Print it all."""
    from floe.selfbench.verdict import judge  # noqa: PLC0415 - lazy: keeps --help fast

    verdict = judge(results.measured())
    if as_json:
        output.print_json(_document(plan, results, verdict))
        return
    for part, (state, why) in results.states.items():
        figures = results.figures.get(part)
        output.line(part if figures is not None else f"{part}: {state}: {why}")
        if figures is not None:
            output.pairs(_OF[part](figures), indent="  ")
    output.line()
    for remark in verdict.remarks:
        output.line(remark)
    output.line(verdict.sentence)


def _document(plan: Plan, results: Results, verdict: Verdict) -> dict[str, Any]:
    parts = {
        part: {
            "state": state,
            **({"reason": why} if why else {}),
            **(asdict(figures) if (figures := results.figures.get(part)) is not None else {}),  # type: ignore[call-overload]
        }
        for part, (state, why) in results.states.items()
    }
    return {
        "planned_seconds": plan.seconds,
        "planned_bytes": plan.size,
        **parts,
        "limit": verdict.limit,
        "limit_bytes_per_second": verdict.bytes_per_second,
        "sentence": verdict.sentence,
        "remarks": list(verdict.remarks),
    }


def _network(found: Network) -> _Pairs:
    from floe.selfbench.verdict import rate, span  # noqa: PLC0415 - lazy: keeps --help fast

    yield "endpoint", found.endpoint
    yield "TCP connect", span(found.tcp_connect_median_seconds)
    link = found.link_bytes_per_second
    yield "interface", f"{found.interface or 'unknown'}, {'its speed not told' if link is None else rate(link)}"


def _upload(found: Upload) -> _Pairs:
    from floe.selfbench.verdict import rate  # noqa: PLC0415 - lazy: keeps --help fast

    yield "put", f"{rate(found.bytes_per_second)}, {found.objects} objects at once, {format_size(found.bytes)} in all"


def _store(found: Store) -> _Pairs:
    from floe.selfbench.verdict import rate, span  # noqa: PLC0415 - lazy: keeps --help fast

    yield "read", f"{found.objects} objects, {format_size(found.objects_bytes)}, of {found.url}"
    yield (
        f"GET of {format_size(found.get_bytes)}",
        f"median {span(found.get_median_seconds)}, p99 {span(found.get_p99_seconds)}, of {found.gets}",
    )
    for step in found.steps:
        several = f"{step.connections} connection{'' if step.connections == 1 else 's'}"
        mark = ", saturates here" if step.connections == found.saturates_at else ""
        yield several, f"{rate(step.bytes_per_second)}, ranges of {format_size(found.range_bytes)}{mark}"
    yield "ended", found.ended


def _cpu(found: Cpu) -> _Pairs:
    from floe.selfbench.verdict import rate  # noqa: PLC0415 - lazy: keeps --help fast

    of = "of the store" if found.of_the_store else "made here"
    yield "decompress and verify", f"{rate(found.content_bytes_per_core_second)} a core, {found.cores} cores"
    yield "frames", f"{found.frames}, {of}, stored in {found.stored_share:.0%} of their content"


def _disk(found: Disk) -> _Pairs:
    from floe.selfbench.verdict import rate, span  # noqa: PLC0415 - lazy: keeps --help fast

    yield "file", f"{format_size(found.bytes)} in {found.path}, {'past' if found.direct else 'through'} the page cache"
    yield "write", rate(found.write_bytes_per_second)
    yield "read", rate(found.read_bytes_per_second)
    for size, median, p99 in (
        ("4 KiB", found.read_4kib_median_seconds, found.read_4kib_p99_seconds),
        ("128 KiB", found.read_128kib_median_seconds, found.read_128kib_p99_seconds),
    ):
        yield f"random {size}", f"median {span(median)}, p99 {span(p99)}"


def _mount(found: Mount) -> _Pairs:
    from floe.selfbench.verdict import rate, span  # noqa: PLC0415 - lazy: keeps --help fast

    yield "model", f"{found.model}, {'of the store' if found.from_store else 'in a store made in the cache directory'}"
    yield "mount", span(found.mount_seconds)
    share = found.cpu_share_of_first
    busy = "" if share is None else f", all cores {share:.0%} busy"
    yield "first reading", f"{rate(found.first_bytes_per_second)}, {format_size(found.bytes)}{busy}"
    yield "read again", f"{rate(found.again_bytes_per_second)}, from the node cache"
    if found.small_first_files_per_second and found.small_again_files_per_second and found.small_first_median_seconds:
        first = (
            f"{found.small_first_files_per_second:.0f} a second first, median {span(found.small_first_median_seconds)}"
        )
        yield (
            "small files",
            f"{first}; {found.small_again_files_per_second:.0f} a second again; {found.small_files} files",
        )


_OF: dict[str, Callable[[Any], _Pairs]] = {
    "network": _network,
    "upload": _upload,
    "store": _store,
    "cpu": _cpu,
    "disk": _disk,
    "mount": _mount,
}
