"""`floe gc`: what nobody names is shown, or removed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import check_patience, open_catalog
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.cli.sizes import format_seconds, format_size, parse_seconds

if TYPE_CHECKING:
    from floe.upkeep.gc import Report, Tally


def add_parser(commands: Commands) -> None:
    """Add `floe gc`."""
    text = "Show what no model and no image needs, and with --delete remove it."
    parser = add_command(commands, "gc", text, run)
    parser.add_argument("--delete", action="store_true", help="remove what nobody has needed for the grace period")
    parser.add_argument(
        "--grace", default="24h", metavar="TIME", help="how long it is kept, for readers; 90m, 24h, 7d (24h)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look, or remove; 0 unless that failed."""
    from floe.store.objects.multipart import uploads_of  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.upkeep.gc import Collector  # noqa: PLC0415 - likewise

    grace = parse_seconds(args.grace)
    settings = settings_of(args)
    if args.delete:
        check_patience(settings)
    if not grace and args.delete:
        output.note(
            "warning: without a grace period, mounts of what is no longer named lose what they have not read yet"
        )
    doing = "remove" if args.delete else "look"
    with open_catalog(settings) as catalog, output.progress(doing, wanted=not args.json) as progress:
        collector = Collector(catalog, uploads_of(catalog.store), grace=grace, progress=progress)
        report = collector.remove() if args.delete else collector.look()
    if args.json:
        output.print_json(_json(report, grace, deleted=args.delete))
    else:
        _print(report, deleted=args.delete)
    return 0


def _json(report: Report, grace: float, *, deleted: bool) -> dict[str, Any]:
    def tallies(found: dict[str, Tally]) -> dict[str, Any]:
        return {kind: {"count": tally.count, "bytes": tally.size} for kind, tally in found.items()}

    return {
        "deleted": deleted,
        "grace_seconds": grace,
        "unneeded": tallies(report.unneeded),
        "due": tallies(report.due),
        "removed": tallies(report.removed),
        "kept": {"count": report.kept.count, "bytes": report.kept.size},
        "needed_packs": report.needed_packs,
        "pushes": report.pushes,
        "dead_pushes": report.dead_pushes,
        "uploads": report.uploads,
        "leftovers": {"count": report.leftovers.count, "bytes": report.leftovers.size},
        "expired": list(report.expired),
        "next_due_seconds": report.next_due,
    }


def _print(report: Report, *, deleted: bool) -> None:
    done = report.removed if deleted else report.due
    rows = []
    for kind, tally in report.unneeded.items():
        of = done.get(kind)
        rows.append((kind, *_shown(tally), *(_shown(of) if of else ("0", ""))))
    if rows:
        output.table(("KIND", "UNNEEDED", "SIZE", "REMOVED" if deleted else "DUE", "SIZE"), rows)
    else:
        output.line("everything in the store is needed")
    for tag in report.expired:
        output.line(f"{tag}: {'removed' if deleted else 'would be removed'} by the rules of `floe model retention`")
    if report.kept.count:
        output.line(f"{report.kept.count} were needed after all")
    if report.pushes:
        output.line(f"pushes under way, whose content stays: {report.pushes}")
    if report.dead_pushes:
        output.line(f"records of pushes that ended without tidying up: {report.dead_pushes}")
    if report.uploads:
        output.line(f"unfinished uploads{'' if deleted else ' that are due'}: {report.uploads}")
    if report.leftovers.count:
        output.line(f"left by checks and benches: {', '.join(_shown(report.leftovers))}")
    if report.next_due is not None:
        marked = "" if deleted else ", once a run with --delete has seen it"
        output.line(f"the next is due in {format_seconds(report.next_due)}{marked}")
    if not deleted and (report.due or report.expired or report.uploads or report.leftovers.count or report.dead_pushes):
        output.line("nothing was removed: that takes --delete")


def _shown(tally: Tally) -> tuple[str, str]:
    return str(tally.count), format_size(tally.size)
