"""`floe trace`: what a start was made of, from the pull to the last thing read for the first time, with every stall by file."""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.names import parse_model
from floe.cli.options import Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.cli.timeline import STALL, Span, Start, Timeline, starts, timeline
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from floe.store.cache import Cache

_SHORTEST = 4  # characters of a container's id
_STALLS_SHOWN = 40  # for people
_BAR = 30  # characters
_TEXT = "container (its id or the beginning of it), image, model NAME[:TAG] or mountpoint; none: list the starts"


def add_parser(commands: Commands) -> None:
    """Add `floe trace`."""
    parser = add_command(commands, "trace", "Show what a start of a container or model was made of.", run)
    parser.add_argument("what", metavar="CONTAINER|IMAGE|MODEL", nargs="?", help=_TEXT)
    parser.add_argument("--html", metavar="FILE", help="write it as one self-contained page with a waterfall, too")
    add_settings(parser, "containerd_socket")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read the node's events, choose a start, name files, and show."""
    settings = settings_of(args)
    if args.html and not args.what:
        raise BadInputError("--html needs a start to show", hint="give a container, an image or a model")
    events = _events(settings)
    known = starts(events)
    if not args.what:
        _list(known, json=args.json)
        return 0
    start = _choose(args.what, known, settings)
    found = trace(settings, events, start)
    if args.html:
        _write(Path(args.html), found)
    if args.json:
        output.print_json(found.encode())
    else:
        _show(found)
    return 0


def trace(settings: Settings, events: Sequence[dict[str, Any]], start: Start) -> Timeline:
    """The timeline of a start, files named by the trees in the node cache."""
    from floe.cli.firstoutput import told_of  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.cache import open_cache  # noqa: PLC0415 - likewise
    from floe.store.erofs import read_device_table  # noqa: PLC0415 - likewise

    events = [*events, *told_of(start.key, settings.containerd_socket)]
    roots = [root for root in settings.cache_roots if root.is_dir()]
    cache = open_cache(roots) if roots else None
    packs: dict[str, str] = {}
    for tree in start.trees:
        path = cache.tree_path(tree) if cache is not None else None
        if path is not None:
            with suppress(FloeError, OSError):
                packs.update((pack_id, tree) for pack_id, _ in read_device_table(path))
    return timeline(events, start, packs, lambda places: _named(cache, start.trees, places))


def _named(cache: Cache | None, trees: Sequence[str], places: Sequence[tuple[str, int, int]]) -> list[list[str]]:
    """The files at places of packs, from the first tree that has some; none where the tree is not here any more."""
    from floe.store.erofs_inodes import Inodes  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.filesat import files_at  # noqa: PLC0415 - likewise

    named: list[list[str]] = [[] for _ in places]
    for tree in trees if places else ():
        path = cache.tree_path(tree) if cache is not None else None
        if path is None:
            continue
        try:
            found = files_at(Inodes(path.read_bytes(), f"tree {tree}"), places)
        except (FloeError, OSError) as error:
            output.note(f"files of tree {tree[:12]} cannot be named: {error}")
            continue
        for place, files in zip(named, found, strict=True):
            if not place:
                place += [file.decode("utf-8", "backslashreplace") for file in files]
    return named


def _events(settings: Settings) -> list[dict[str, Any]]:
    from floe.store.eventlog import FOLDER, read_events  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        return read_events(settings.run_dir)
    except PermissionError as error:
        raise AccessDeniedError(f"cannot read {settings.run_dir / FOLDER}", hint="run it as root") from error
    except OSError as error:
        raise UnavailableError(f"cannot read {settings.run_dir / FOLDER}: {error.strerror}") from error


def _choose(what: str, known: Sequence[Start], settings: Settings) -> Start:
    """The latest start of `what`. NotFoundError; BadInputError when a container's id begins like another's."""
    exact = [one for one in known if what in (one.key, one.id, one.name)]
    begins = [
        one for one in known if len(what) >= _SHORTEST and one.id.startswith(what) and not one.key.startswith("/")
    ]
    found = exact or begins
    if len({one.key for one in begins}) > 1 and not exact:
        ids = ", ".join(sorted({one.id[:24] for one in begins}))
        raise BadInputError(f"several containers begin with {what!r}: {ids}", hint="give more of the id")
    if not found:
        names = {what, str(Path(what).absolute()), f"{what}:latest", f"docker.io/library/{what}", f"docker.io/{what}"}
        names |= {f"{name}:latest" for name in names}
        with suppress(FloeError):
            names.add(str(parse_model(what)[0]))
        found = [one for one in known if one.key in names or one.name in names]
    if not found:
        trees = _trees(what, settings)
        found = [one for one in known if trees and not trees.isdisjoint(one.trees)]
    if not found:
        raise NotFoundError(
            f"no start of {what!r} is known on this node",
            hint="`floe trace` lists those that are; events are kept in the run directory, and go with a reboot",
        )
    return max(found, key=lambda one: one.at)


def _trees(what: str, settings: Settings) -> set[str]:
    """The tree of a model, or of an image's topmost lazy layer, as the store knows them; none when it does not."""
    from floe.cli.image import find  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        with open_catalog(settings) as catalog:
            with suppress(FloeError):
                return {catalog.resolve_model(parse_model(what)[0])[1].tree.digest}
            for diff_id in reversed(find(catalog, what).diff_ids):
                layer = catalog.layer(diff_id)
                if layer is not None:
                    return {layer[1].tree.digest}
    except FloeError as error:
        output.note(f"the store does not tell the trees of {what!r}: {error}")
    return set()


def _list(known: Sequence[Start], *, json: bool) -> None:
    rows = [
        {
            "at": one.at,
            "key": one.key,
            "name": one.name or None,
            "trees": len(one.trees),
            "first_read": one.end["first_read"] if one.end else None,
            "last_read": one.end["last_read"] if one.end else None,
        }
        for one in reversed(known)
    ]
    if json:
        output.print_json(rows)
        return
    output.table(
        ("WHEN", "START", "OF", "FIRST READ", "LAST NEW READ"),
        (
            (_when(one.at), one.id[:40], one.name or "-", *(_seconds(one, key) for key in ("first_read", "last_read")))
            for one in reversed(known)
        ),
    )


def _seconds(start: Start, key: str) -> str:
    return f"{start.end[key]:.3f} s" if start.end else "-"


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _show(found: Timeline) -> None:
    start = found.start
    output.line(f"{start.id}{f' of {start.name}' if start.name else ''}, {_when(found.began)} UTC")
    if start.end is None:
        output.note("the end of this start is not known: it goes on, nothing of it was read, or the worker ended")
    shown = set(found.stalls[:_STALLS_SHOWN])
    spans = [span for span in found.spans if span.kind != STALL or span in shown]
    output.table(("AT", "TAKES", "", "WHAT", "DETAIL"), ((*_row(span, found.seconds), _detail(span)) for span in spans))
    stalls = found.stalls
    if len(stalls) > _STALLS_SHOWN:
        output.note(f"and {len(stalls) - _STALLS_SHOWN} shorter stalls; --json and --html have all")
    if stalls:
        worst = stalls[0]
        output.line(
            f"{len(stalls)} stalls, in which reads waited for {found.waited:.3f} s; the longest {worst.seconds:.3f} s: {worst.what}, {worst.cause}"
        )
    if found.meanwhile:
        output.line("meanwhile, on the whole node: " + ", ".join(f"{k} {v}" for k, v in found.meanwhile.items()))


def _row(span: Span, whole: float) -> tuple[str, str, str, str]:
    takes = f"{span.seconds:.3f} s" if span.seconds else ""
    return (
        f"{span.at:9.3f} s",
        takes,
        bar(span, whole),
        f"{span.kind.upper() if span.kind == STALL else span.kind}: {span.what}",
    )


def bar(span: Span, whole: float) -> str:
    """Where a span lies in the whole, as _BAR characters."""
    if not whole:
        return "|"
    first = min(_BAR - 1, int(span.at / whole * _BAR))
    length = max(1, round(span.seconds / whole * _BAR))
    return (" " * first + ("#" * length if span.seconds else "|"))[:_BAR].ljust(_BAR)


def _detail(span: Span) -> str:
    parts = [span.cause or "", f"{span.bytes} bytes" if span.bytes is not None else "", span.detail]
    return ", ".join(part for part in parts if part)


def _write(path: Path, found: Timeline) -> None:
    from floe.cli.trace_page import page  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}", hint="give another --html FILE") from error
