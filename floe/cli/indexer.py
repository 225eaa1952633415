"""`floe indexer`: a worker that indexes what it is asked for; status and retry look after its queue."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.cli import output, signatures
from floe.cli.context import make_spool, open_catalog
from floe.cli.options import PUSHING, Commands, add_command, add_commands, add_json, add_settings, settings_of
from floe.cli.settings import Settings, flag_name
from floe.cli.sizes import format_seconds, parse_seconds
from floe.store.errors import BadInputError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.index.jobs import Failure, Queue, QueueStatus

_log = logging.getLogger(__name__)
_SETTINGS = ("image_policy", "image_grace", "registry_config", *PUSHING)
_SHOWN = 20  # failures, for people
_LEAST_SWEEP = 1.0  # seconds
_OF_WEBHOOK = ("webhook_secret", "webhook_registry")


def add_parser(commands: Commands) -> None:
    """Add `floe indexer` and its commands."""
    text = "Index the images that nodes, registries and floe image index --queue name, until it is stopped."
    parser = add_command(commands, "indexer", text, run)
    parser.add_argument("--once", action="store_true", help="end when nothing waits that could be done now")
    parser.add_argument(
        "--webhook", metavar="[HOST]:PORT", help="also listen there for notifications of registries (distribution)"
    )
    parser.add_argument(
        "--webhook-secret", metavar="FILE", help="the secret that they send: Authorization: Bearer SECRET"
    )
    parser.add_argument(
        "--webhook-registry", metavar="HOST[:PORT]", help="how nodes name the registry, where it names itself otherwise"
    )
    parser.add_argument(
        "--sweep", default="1h", metavar="TIME", help="between two looks for images that registries deleted (1h)"
    )
    add_settings(parser, *_SETTINGS)
    add_settings(parser, "indexer_metrics", aliases=("--metrics",))
    below = add_commands(parser, shown=(*_SETTINGS, "indexer_metrics"))
    status = add_command(below, "status", "Show the queue: what waits, who works, and what failed and why.", run_status)
    add_json(status)
    retry = add_command(below, "retry", "Put jobs that were given up back into the queue.", run_retry)
    retry.add_argument("id", nargs="*", metavar="ID", help="of a job that status lists; all without one")
    add_json(retry)


def run(args: argparse.Namespace) -> int:
    """Work until SIGTERM; what is in hand then is given back."""
    sweep = parse_seconds(args.sweep)
    if sweep < _LEAST_SWEEP:
        raise BadInputError(f"--sweep {args.sweep}: at least {_LEAST_SWEEP:g} s")
    if args.webhook and not args.webhook_secret:
        raise BadInputError("--webhook needs a secret", hint="give --webhook-secret FILE")
    if not args.webhook and (lone := [name for name in _OF_WEBHOOK if getattr(args, name)]):
        flag = f"--{flag_name(lone[0])}"
        raise BadInputError(f"{flag} says nothing without --webhook", hint=f"add --webhook :8080, or leave {flag} out")
    settings = settings_of(args, daemon=True)
    from floe.indexer.events import check_registry  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.indexer.metrics import serving  # noqa: PLC0415 - likewise
    from floe.indexer.webhook import Webhook, parse_listen, read_secret  # noqa: PLC0415 - likewise
    from floe.indexer.worker import Indexer, IndexerConfig  # noqa: PLC0415 - likewise
    from floe.store.process import sd_notify  # noqa: PLC0415 - likewise
    from floe.store.stopsignal import stop_signal  # noqa: PLC0415 - likewise

    listen = parse_listen(args.webhook) if args.webhook else None
    registry = check_registry(args.webhook_registry) if args.webhook_registry else None
    if listen is not None:
        read_secret(Path(args.webhook_secret))  # before the store is made or Redis asked for anything
    make_spool(settings)
    signatures.warn_unsigned(settings, "what is indexed")
    config = IndexerConfig(
        spool_dir=settings.spool,
        workers=settings.workers,
        rules=settings.image_policy.rules,
        registry_config=settings.registry_config,
        grace=settings.image_grace,
        sweep=sweep,
    )
    with contextlib.ExitStack() as stack:
        catalog, queue = stack.enter_context(_opened(settings, signing=True))
        stop = stop_signal()
        if listen is not None:
            webhook = Webhook(
                listen,
                Path(args.webhook_secret),
                queue,
                registry=registry,
                rules=settings.image_policy.rules,
            )
            stack.callback(webhook.close)
            _log.info("listening for notifications at %s:%d", *webhook.address)
        worker = Indexer(catalog, queue, config, stop)
        if (address := settings.metrics("indexer")) is not None:
            stack.enter_context(serving(address, worker, queue))
        _log.info("indexing as %s", worker.name)
        sd_notify("READY=1")
        worker.run(drain=args.once)
        sd_notify("STOPPING=1")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """The queue as it stands; 0 whatever failed in it."""
    with _opened(settings_of(args)) as (_, queue):
        found = queue.status()
    if args.json:
        output.print_json(_json(found))
    else:
        _print(found)
    return 0


def run_retry(args: argparse.Namespace) -> int:
    """Jobs that were given up, back into the queue."""
    with _opened(settings_of(args)) as (_, queue):
        known = {failure.id for failure in queue.status(10_000).failures if failure.due is None}
        unknown = [ident for ident in args.id if ident not in known]
        if unknown:
            raise BadInputError(
                f"no job {unknown[0]} was given up", hint="`floe indexer status` lists them, with their ids"
            )
        revived = queue.revive(args.id or None)
    if args.json:
        output.print_json({"retried": revived})
    else:
        output.line(f"{revived} jobs wait again")
    return 0


@contextlib.contextmanager
def _opened(settings: Settings, *, signing: bool = False) -> Iterator[tuple[Catalog, Queue]]:
    """The catalog and its queue, closed afterwards."""
    from floe.store.index.jobs import open_queue  # noqa: PLC0415 - lazy: keeps --help fast

    with open_catalog(settings, signing=signing) as catalog:
        url = None if settings.index == "none" else settings.index
        # Who works makes the store, as a push does; who looks does not.
        record = catalog.ensure_store() if signing else catalog.check_store()
        with contextlib.closing(open_queue(url, record.uuid)) as queue:
            yield catalog, queue


def ask(settings: Settings, image: str, platform: str | None, lay_out: str, *, plain_http: bool) -> bool:
    """Let an indexer index `image`; False when that was asked already. BadInputError: nobody else can read it."""
    from floe.ingest.oci.references import RegistryRef, parse_image_ref  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index.jobs import Job  # noqa: PLC0415 - likewise

    ref = parse_image_ref(image)
    if not isinstance(ref, RegistryRef):
        raise BadInputError(
            f"{image} cannot be indexed by another machine", hint="push it to a registry, or leave out --queue"
        )
    job = Job(str(ref), platform=platform or "", lay_out=lay_out, plain_http=plain_http, asked=time.time())
    with _opened(settings) as (_, queue):
        return queue.put(job)


def _json(found: QueueStatus) -> dict[str, Any]:
    return {
        "waiting": found.waiting,
        "working": found.working,
        "retrying": found.retrying,
        "failed": found.failed,
        "lag_seconds": found.lag,
        "counts": dict(found.counts),
        "stream": found.stream,
        "workers": [{"name": one.name, "jobs": one.jobs, "idle_seconds": one.idle} for one in found.workers],
        "failures": [_failure(one) for one in found.failures],
    }


def _failure(one: Failure) -> dict[str, Any]:
    job = one.job
    return {
        "id": one.id or None,
        "image": job.ref if job else None,
        "action": job.action if job else None,
        "platform": job.platform or None if job else None,
        "origin": job.origin if job else None,
        "tries": job.tries if job else 0,
        "error": job.error if job else "it is no job that this Floe knows",
        "due_seconds": one.due,
    }


def _print(found: QueueStatus) -> None:
    lag = f", the oldest for {format_seconds(found.lag)}" if found.lag else ""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items())) or "nothing"
    output.pairs(
        (
            ("waiting", f"{found.waiting}{lag}"),
            ("working", str(found.working)),
            ("retrying", str(found.retrying)),
            ("given up", str(found.failed)),
            ("so far", counts),
            ("stream", found.stream),
        )
    )
    if found.workers:
        output.line()
        rows = ((one.name, str(one.jobs), format_seconds(one.idle)) for one in found.workers)
        output.table(("WORKER", "JOBS", "SILENT FOR"), rows)
    failures = [_failure(one) for one in found.failures[:_SHOWN]]
    if failures:
        output.line()
        output.table(
            ("ID", "IMAGE", "TRIES", "AGAIN IN", "ERROR"),
            (
                (
                    one["id"] or "-",
                    one["image"] or "-",
                    str(one["tries"]),
                    "never" if one["due_seconds"] is None else format_seconds(one["due_seconds"]),
                    one["error"],
                )
                for one in failures
            ),
        )
    if len(found.failures) > _SHOWN:
        output.note(f"and {len(found.failures) - _SHOWN} failures more; --json lists them")
