"""`floe top`: the node in a terminal, live: what is mounted and how much of it is here, rates, reads under way, problems."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.sizes import format_size
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from rich.console import RenderableType

_INTERVAL = 1.0  # seconds
_BAR = 24  # characters
_TEXT = (
    "Show mounts, rates and problems of this node, live; one sample where the output is no terminal. Ctrl-C ends it."
)


def add_parser(commands: Commands) -> None:
    """Add `floe top`."""
    parser = add_command(commands, "top", _TEXT, run)
    parser.add_argument("--once", action="store_true", help="print one sample and end")
    text = f"time between two samples ({_INTERVAL:g})"
    parser.add_argument("--interval", type=float, default=_INTERVAL, metavar="SECONDS", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Sample until interrupted, or once."""
    settings = settings_of(args)
    if not 0.1 <= args.interval <= 3600:
        raise BadInputError(f"{args.interval:g} s is no time between samples", hint="give --interval of 0.1 to 3600")
    from floe.cli.live import Live  # noqa: PLC0415 - lazy: keeps --help fast

    live = Live(settings)
    if args.json or args.once or not sys.stdout.isatty():
        live.sample(patient=True)
        time.sleep(args.interval)  # a rate needs two
        found = live.sample()
        if args.json:
            output.print_json(found)
        else:
            _print(found)
        return 0
    _watch(live, args.interval)
    return 0


def _watch(live: Any, interval: float) -> None:
    from rich.console import Console  # noqa: PLC0415 - some 60 ms
    from rich.live import Live as Screen  # noqa: PLC0415 - likewise

    console = Console()
    try:
        with Screen(
            _picture(live.sample(), console.height), console=console, screen=True, auto_refresh=False
        ) as screen:
            while True:
                time.sleep(interval)
                screen.update(_picture(live.sample(), console.height), refresh=True)
    except KeyboardInterrupt:
        return


def _picture(found: Mapping[str, Any], height: int) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415 - some 60 ms
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    table = Table(box=None, pad_edge=False, expand=True, header_style="bold")
    table.add_column("MOUNT", ratio=3, no_wrap=True, overflow="ellipsis")
    table.add_column("MODE", no_wrap=True)
    table.add_column("HERE", justify="right", no_wrap=True)
    table.add_column("OF", justify="right", no_wrap=True)
    table.add_column("FRAMES", no_wrap=True, width=_BAR)
    table.add_column("USES", justify="right")
    wrong = [
        Text(f"{one['level']}: {output.printable(one['text'])}; {one['mend']}", no_wrap=True, overflow="ellipsis")
        for one in found["problems"][:5]
    ]
    room = max(1, height - 7 - len(wrong))
    for mount in found["mounts"][:room]:
        here, whole = mount["here_bytes"], mount["content_bytes"]
        size = format_size(whole) if whole is not None else "-"
        table.add_row(
            Text(_name(mount)), mount["mode"], _share(here, whole), size, _frames(mount["map"]), str(mount["uses"])
        )
    left = len(found["mounts"]) - room
    more = [Text(f"and {left} more", style="dim")] if left > 0 else []
    return Group(*(Text(line) for line in _head(found)), Text(), table, *more, Text(), *wrong)


def _frames(cells: Mapping[str, str]) -> Any:
    """The frame map in _BAR characters: what was read in green, fetched ahead in yellow, else here in blue."""
    from rich.text import Text  # noqa: PLC0415 - some 60 ms

    drawn = Text()
    count = len(cells["here"])
    for position in range(min(_BAR, count)):
        part = (
            slice(position * count // _BAR, max((position + 1) * count // _BAR, position * count // _BAR + 1))
            if count > _BAR
            else slice(position, position + 1)
        )
        here, touched, ahead = (sum(map(int, cells[plane][part])) for plane in ("here", "touched", "ahead"))
        full = here >= 9 * len(cells["here"][part])
        style = "green" if touched * 2 > here else "yellow" if ahead * 2 > here else "blue"
        drawn.append("█" if full else "▒" if here else "·", style=style if here else "dim")
    return drawn


def _head(found: Mapping[str, Any]) -> list[str]:
    packfs, cache, rates = found["packfs"], found["cache"], found["rates"]
    lines = [f"floe {found['version']} on {found['host']}: {len(found['mounts'])} trees mounted"]
    if packfs["running"]:
        held, limit = cache["held_bytes"] or 0, cache["limit_bytes"] or 0
        lines[0] += f", cache {format_size(held)}" + (f" of {format_size(limit)}" if limit else "")
        lines[0] += f", {packfs['inflight']} reads in flight, {cache['queued'] or 0} queued"
    else:
        lines[0] += f", pack filesystem {packfs['state']}"
    if rates["seconds"]:
        ratio = f"{rates['hit_ratio']:.0%}" if rates["hit_ratio"] is not None else "-"
        parts = [f"{name} {format_size(int(one['bytes']))}/s" for name, one in rates["sources"].items()]
        lines.append(f"reads {rates['reads']['requests']:.0f}/s, hits {ratio}; " + ", ".join(parts))
    return lines


def _name(mount: Mapping[str, Any]) -> str:
    return output.printable(mount["names"][0]) if mount["names"] else f"tree {mount['tree'][:16]}"


def _share(here: int | None, whole: int | None) -> str:
    return "-" if here is None or whole is None else "100%" if here >= whole else f"{min(99, 100 * here // whole)}%"


def _print(found: Mapping[str, Any]) -> None:
    for line in _head(found):
        output.line(line)
    output.table(
        ("MOUNT", "MODE", "HERE", "OF", "USES"),
        (
            (
                _name(mount),
                mount["mode"],
                _share(mount["here_bytes"], mount["content_bytes"]),
                format_size(mount["content_bytes"]) if mount["content_bytes"] is not None else "-",
                str(mount["uses"]),
            )
            for mount in found["mounts"]
        ),
    )
    for problem in found["problems"]:
        output.line(f"{problem['level']}: {problem['text']}; {problem['mend']}")
