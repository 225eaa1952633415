"""`floe model retention`: which tags stay when `floe gc --delete` runs."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.options import Commands, add_command, add_json, settings_of
from floe.store.errors import BadInputError, NotFoundError

_PATTERN = re.compile(r"[-._/a-z0-9*?\[\]!]+")


def add_parser(below: Commands) -> None:
    """Add `floe model retention`."""
    text = "Show the rules by which floe gc removes old tags; with a pattern of names, set or remove one."
    parser = add_command(below, "retention", text, run)
    parser.add_argument("pattern", metavar="NAMES", nargs="?", help='names of models: llama, or "team/*"')
    parser.add_argument("--keep-last", type=int, metavar="N", help="tags that stay, those moved last")
    parser.add_argument("--keep", action="append", default=[], metavar="TAGS", help='tags that stay besides: "v*"')
    parser.add_argument("--remove", action="store_true", help="remove the rule: all tags stay")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Show, set or remove; nothing but `floe gc --delete` removes tags."""
    _check(args)
    settings = settings_of(args)
    from floe.store import layout  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.refs import replace_record  # noqa: PLC0415 - likewise
    from floe.store.retention import Retention, Rule, read_retention  # noqa: PLC0415 - likewise

    with open_catalog(settings) as catalog:
        catalog.check_store()
        found = read_retention(catalog.store)
        if args.pattern is not None:

            def change(known: Retention | None) -> Retention:
                rules = known.rules if known is not None else ()
                if args.remove:
                    if all(rule.name != args.pattern for rule in rules):
                        raise NotFoundError(
                            f"there is no rule for {args.pattern!r}", hint="`floe model retention` lists them"
                        )
                    return Retention(tuple(rule for rule in rules if rule.name != args.pattern))
                new = Rule(args.pattern, args.keep_last, tuple(args.keep))
                if any(rule.name == args.pattern for rule in rules):
                    return Retention(tuple(new if rule.name == args.pattern else rule for rule in rules))
                return Retention((*rules, new))

            _, found = replace_record(catalog.store, layout.RETENTION_KEY, Retention, change)
    if args.json:
        output.print_json([asdict(rule) for rule in found.rules])
    elif found.rules:
        rows = ((rule.name, str(rule.keep_last), ", ".join(rule.keep)) for rule in found.rules)
        output.table(("NAMES", "KEEP LAST", "KEEP"), rows)
    else:
        output.line("there are no rules: all tags stay")
    return 0


def _check(args: argparse.Namespace) -> None:
    given = args.keep_last is not None or args.keep
    if args.pattern is None and (given or args.remove):
        raise BadInputError("a rule is for some models", hint="give a pattern of their names")
    if args.pattern is not None and args.remove == bool(given):
        raise BadInputError(f"what is to be done about {args.pattern!r}?", hint="give --keep-last N, or --remove")
    if given and (args.keep_last is None or args.keep_last < 0):
        raise BadInputError("--keep-last must be a number, 0 or more", hint="0 keeps only what --keep names")
    for pattern in (*([args.pattern] if args.pattern is not None else []), *args.keep):
        if _PATTERN.fullmatch(pattern) is None:
            raise BadInputError(
                f"{pattern!r} is no pattern of names", hint="use lower case, and * or ?; no tag in NAMES"
            )
