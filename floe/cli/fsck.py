"""`floe fsck`: whether the store is sound, whom damage concerns, and its repair."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import check_patience, make_spool, open_catalog
from floe.cli.exit import DAMAGE, DONE
from floe.cli.options import PUSHING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.sizes import Size, format_size
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from floe.cli.settings import Settings
    from floe.store.catalog import Catalog
    from floe.upkeep.fsck import Checked, Fault

_AGAIN = "push it or index it again, with --verify, which stores anew what is missing or damaged"
_SHOWN = 8


def add_parser(commands: Commands) -> None:
    """Add `floe fsck`."""
    parser = add_command(commands, "fsck", "Check that all that is named in the store is there, and sound.", run)
    parser.add_argument("--deep", action="store_true", help="read and verify all content too")
    parser.add_argument("--rate", metavar="SIZE", help="read at most so many bytes of content a second")
    text = (
        "put sound copies in the place of what is damaged; remove packs of which there are none, so that a push heals"
    )
    parser.add_argument("--repair", action="store_true", help=text)
    text = "check this node's cache instead of the store; with --repair drop what is bad of it"
    parser.add_argument("--cache", action="store_true", help=text)
    text = "with --repair: another store that may have copies"
    parser.add_argument("--from", dest="other", metavar="URL", help=text)
    add_settings(parser, *PUSHING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check, and repair what can be. 0: all is sound, or was made so; 3: damage is left; 1: it could not be checked."""
    from floe.upkeep.fsck import Checker  # noqa: PLC0415 - lazy: keeps --help fast

    if args.cache:
        return _run_cache(args)
    if args.other is not None and not args.repair:
        raise BadInputError("--from is for --repair", hint="add --repair")
    rate = None if args.rate is None else Size.parse(args.rate, percent=False).of(0)
    if rate == 0:
        raise BadInputError("--rate 0 would never end", hint="leave it out for no bound")
    settings = settings_of(args)
    if args.repair:
        check_patience(settings)
    with open_catalog(settings) as catalog:
        with output.progress("check", wanted=not args.json) as progress:
            checker = Checker(catalog, deep=args.deep, workers=settings.workers, rate=rate, progress=progress)
            checked = checker.run()
        if args.repair and checked.faults:
            _repair(settings, catalog, checked.faults, args.other, wanted=not args.json)
    left = [fault for fault in checked.faults if not fault.repaired]
    if args.json:
        output.print_json(_json(checked, deep=args.deep))
    else:
        _print(checked, left, deep=args.deep)
    return DAMAGE if left else DONE


def _run_cache(args: argparse.Namespace) -> int:
    """The cache alone: no store is asked."""
    from floe.store.cache import NodeCache  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.upkeep.cachecheck import CacheChecked, check_cache, drop_bad  # noqa: PLC0415 - likewise

    if args.deep or args.rate is not None or args.other is not None:
        raise BadInputError("--cache goes with --repair and --json only", hint="check the store in a second command")
    settings = settings_of(args)
    checked = CacheChecked()
    for root in settings.cache_roots:
        with output.progress(f"check {root}", wanted=not args.json) as progress:
            found = check_cache(root, progress)
        if args.repair and found.bad:
            drop_bad(NodeCache(root), found)
        checked.add(found)
    left = [pack for pack in checked.bad if not pack.dropped]
    if args.json:
        output.print_json({**asdict(checked), "damaged": bool(left)})
        return DAMAGE if left else DONE
    for pack in checked.bad:
        what = "dropped, and fetched anew when they are read" if pack.dropped else "bad"
        output.line(f"pack {pack.id}: {len(pack.frames)} frames are {what}")
    output.line(f"{checked.frames} frames in {checked.packs} packs of the cache, {format_size(checked.read_bytes)}")
    if left and args.repair:
        output.note(f"{len(left)} packs are mounted natively, or their disk fails: unmount them, then try again")
    elif left:
        output.note("--repair drops what is bad; floe packfs must be stopped for that")
    return DAMAGE if left else DONE


def _repair(settings: Settings, catalog: Catalog, faults: list[Fault], other: str | None, *, wanted: bool) -> None:
    from floe.store.objects import open_store  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - likewise
    from floe.upkeep.repair import Repairer  # noqa: PLC0415 - likewise

    make_spool(settings)
    with ExitStack() as stack:
        copies = None
        if other is not None:
            opened = RetryingStore(open_store(other, retry=False), deadline=settings.store_timeout)
            copies = stack.enter_context(closing(opened))
        progress = stack.enter_context(output.progress("repair", wanted=wanted))
        read = progress.advance if progress is not None else lambda _: None
        caches = [root / "packs" for root in settings.cache_roots]
        Repairer(catalog, other=copies, caches=caches, spool=settings.spool, read=read).repair(faults)


def _json(checked: Checked, *, deep: bool) -> dict[str, Any]:
    found = asdict(checked)
    found["deep"] = deep
    found["damaged"] = any(not fault.repaired for fault in checked.faults)
    return found


def _print(checked: Checked, left: list[Fault], *, deep: bool) -> None:
    for fault in checked.faults:
        output.line(f"{fault.kind} {fault.name}: {fault.detail}")
        if fault.frames:
            more = "..." if len(fault.frames) > _SHOWN else ""
            output.line(f"  frames: {', '.join(map(str, fault.frames[:_SHOWN]))}{more}")
        for what, names in (("model", fault.models), ("image", fault.images), ("layer", fault.layers)):
            for name in names:
                output.line(f"  {what} {name}")
        if not (fault.models or fault.images or fault.layers):
            output.line("  no model and no image uses it")
        if fault.repair:
            output.line(f"  {fault.repair}")
    read = "read and verified" if deep else "not read, only looked for (--deep reads it)"
    output.line(
        f"{checked.models} models, {checked.images} images and {checked.layers} layers; {checked.manifests} manifests, "
        f"{checked.trees} trees, {checked.packs} packs, whose content was {read}"
    )
    if checked.orphans:
        output.line(
            f"{checked.orphans} objects of {format_size(checked.orphan_bytes)} are named by nothing; see floe gc"
        )
    repaired = len(checked.faults) - len(left)
    if repaired:
        output.line(f"{repaired} faults were repaired")
    if left:
        output.note(f"{len(left)} faults are left; what they concern: {_AGAIN}")
    elif not checked.faults:
        output.line("no damage was found")
