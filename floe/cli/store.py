"""`floe store`: init and check."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import open_catalog
from floe.cli.options import Commands, add_command, add_commands, add_json, settings_of

if TYPE_CHECKING:
    from floe.store.objects.base import ObjectStore
    from floe.store.objects.check import Report

_ROLES = ("reader", "writer", "remover")
_CONDITIONS = {
    "honoured": "the server honours them",
    "compared": "the server refuses them: Floe compares before it writes. Of two pushes to one tag at the same moment, "
    "one may be lost unseen",
    "ignored": "the server ignores them: of two pushes to one tag at the same moment, one may be lost unseen",
    "unknown": "unknown",
}


def add_parser(commands: Commands) -> None:
    """Add `floe store` and its commands."""
    below = add_commands(add_command(commands, "store", "Create the object store, and check what may be done with it."))
    init = add_command(below, "init", "Create the store, and its bucket, unless they are there.", run_init)
    init.add_argument("--project", metavar="NAME", help="gs:// only: the project that a new bucket belongs to")
    check = add_command(below, "check", "Try everything that readers and writers do with the store.", run_check)
    check.add_argument(
        "--role", choices=_ROLES, default="writer", help="whose needs decide about the exit status (writer)"
    )
    for parser in (init, check):
        add_json(parser)


def run_init(args: argparse.Namespace) -> int:
    """Make the bucket or folder and the store's record; what is there already stays as it is."""
    from floe.store.errors import BadInputError, NotFoundError  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.objects import open_store  # noqa: PLC0415 - likewise

    settings = settings_of(args)
    if args.project is not None and not settings.store.startswith("gs://"):
        raise BadInputError("--project is for gs:// stores only", hint="leave it out")
    with closing(open_store(settings.store, retry=False)) as inner:
        made_bucket = _ensure_bucket(inner, args.project)
    with open_catalog(settings) as catalog:
        try:
            record, made = catalog.check_store(), False
        except NotFoundError:
            record, made = catalog.ensure_store(), True
        url = catalog.store.url
    if args.json:
        found = {"store": url, "uuid": record.uuid, "created": made, "created_bucket": made_bucket}
        output.print_json(found)
        return 0
    if made_bucket:
        output.line(f"created the bucket of {url}")
    output.line(f"{'created the store' if made else 'there is a store already at'} {url}, {record.uuid}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Try, clean up, say what is missing. 0 when the role's needs are met."""
    from floe.store.objects import open_store  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.objects.check import check_store  # noqa: PLC0415 - likewise
    from floe.store.objects.multipart import uploads_of  # noqa: PLC0415 - likewise
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - likewise

    settings = settings_of(args)
    inner = open_store(settings.store, retry=False)
    kms_key = getattr(getattr(inner, "address", None), "kms_key", None)
    with closing(RetryingStore(inner, deadline=settings.store_timeout)) as store:
        report = check_store(store, uploads_of(inner), kms_key=kms_key)
    satisfied = report.satisfied(args.role)
    if args.json:
        output.print_json(_json(report, args.role))
    else:
        _print(report)
        if not satisfied:
            output.note(f"the needs of a {args.role} are not met")
    return 0 if satisfied else 1


def _ensure_bucket(store: ObjectStore, project: str | None) -> bool:
    """Whether a bucket was made; a folder makes itself."""
    if store.url.startswith(("s3://", "gs://")):
        from floe.store.objects.buckets import ensure_gcs_bucket, ensure_s3_bucket  # noqa: PLC0415 - lazy, as above
        from floe.store.objects.gcs import GCSStore  # noqa: PLC0415 - likewise
        from floe.store.objects.s3 import S3Store  # noqa: PLC0415 - likewise

        if isinstance(store, S3Store):
            return ensure_s3_bucket(store)
        if isinstance(store, GCSStore):
            return ensure_gcs_bucket(store, project)
    return False


def _json(report: Report, role: str) -> dict[str, Any]:
    return {
        "store": report.url,
        "role": role,
        "satisfied": report.satisfied(role),
        "roles": report.roles,
        "operations": [
            {
                "operation": finding.operation,
                "role": finding.role,
                "state": finding.state,
                "permissions": list(finding.permissions),
                "detail": finding.detail,
            }
            for finding in report.findings
        ],
        "conditional_puts": report.conditional_puts,
        "missing_policy": report.missing,
        "left_objects": report.left,
        "dropped_uploads": report.dropped_uploads,
        "open_uploads": report.open_uploads,
    }


def _print(report: Report) -> None:
    rows = [(f.operation, f.role, f.state, ", ".join(f.permissions)) for f in report.findings]
    output.table(("OPERATION", "NEEDED BY", "STATE", "PERMISSIONS"), rows)
    output.line()
    for finding in report.findings:
        if finding.detail:
            output.line(f"{finding.operation}: {finding.detail}")
    output.pairs(
        (
            *((role, "yes" if satisfied else "no") for role, satisfied in report.roles.items()),
            ("conditional puts", _CONDITIONS[report.conditional_puts]),
        )
    )
    if report.dropped_uploads or report.open_uploads:
        output.line(f"unfinished uploads: {report.dropped_uploads} dropped, {report.open_uploads} left, being young")
    for key in report.left:
        output.note(f"could not remove the probe object {key}")
    if report.missing is not None:
        output.line("\nthis would allow what was denied:")
        output.line(json.dumps(report.missing, indent=2))
