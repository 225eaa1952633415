"""`floe bench`: what binds reads on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from floe.cli import bench_report, output
from floe.cli.context import make_directory, vouching_of
from floe.cli.names import parse_model
from floe.cli.options import MOUNTING, READING, TRUSTING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.cli.sizes import Size, format_size
from floe.cli.trusted import TrustedKeys
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, NoSpaceError

if TYPE_CHECKING:
    from floe.selfbench.mounted import Node
    from floe.selfbench.plan import Plan
    from floe.selfbench.scratch import Scratch
    from floe.selfbench.subject import Subject
    from floe.store.ids import ModelRef
    from floe.store.objects.base import ObjectStore
    from floe.store.vouching import Vouching

_NODE = (
    *("store", "index", "cache_dir", "cache_dirs", "root", "run_dir", "cache_size", "cache_min_free"),
    *("store_timeout", "log_level"),
)
_PATIENCE = 20.0  # seconds that a read through the mount waits for the store: an interrupt waits as long


def add_parser(commands: Commands) -> None:
    """Add `floe bench`."""
    text = "Measure the store, the network, the processor, the cache disk and a mount, and say what binds reads here."
    parser = add_command(commands, "bench", text, run)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="read this model, NAME[:TAG] or NAME@DIGEST")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="N", help="how long to measure, about (25)")
    parser.add_argument(
        "--size", default="2GiB", metavar="SIZE", help="bytes to read of the store at most; a quarter to write (2GiB)"
    )
    parser.add_argument("--only", metavar="PARTS", help="some of store,cpu,disk,mount, with commas")
    parser.add_argument(
        "--write", action="store_true", help="put objects below bench/ in the store too, and remove them again"
    )
    add_settings(parser, *READING, *MOUNTING, *TRUSTING)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Say what will be done, measure, clear up, and judge. 0 unless a part failed."""
    from floe.selfbench.bench import Bench  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.selfbench.plan import Plan, parse_parts  # noqa: PLC0415 - likewise
    from floe.selfbench.scratch import uses  # noqa: PLC0415 - likewise
    from floe.store.objects import open_store  # noqa: PLC0415 - likewise
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - likewise

    plan = Plan(args.seconds, Size.parse(args.size, percent=False).of(0), parse_parts(args.only), args.write)
    if plan.write and "store" not in plan.parts:
        raise BadInputError("--write is for the store", hint="leave it out, or add store to --only")
    wanted = None if args.model is None else parse_model(args.model)[0]
    settings = settings_of(args)
    with closing(RetryingStore(open_store(settings.store, retry=False), deadline=settings.store_timeout)) as store:
        _check_disk(settings, plan)
        output.note(_announcement(settings, plan))
        subject = _look(store, vouching_of(settings, trusting=True), wanted, plan)
        make_directory(settings.cache_dir, "cache directory", "--cache-dir")

        def clear(scratch: Scratch) -> None:
            from floe.cli import packfs_process  # noqa: PLC0415 - lazy: keeps --help fast

            with _undisturbed():
                scratch.remove_mounts(_node(settings, scratch, made=False).umount, packfs_process.stop)
                scratch.remove_objects(lambda: open_store(settings.store))
                scratch.remove_files()

        with _terminable(), uses(settings.cache_dir, clear) as scratch:
            results = Bench(
                plan,
                store,
                subject=subject,
                scratch=scratch,
                node=lambda made: _node(settings, scratch, made=made),
                say=_say,
            ).run()
            # Before clearing up: when that fails, the command does, and what was measured is told all the same.
            bench_report.show(plan, results, as_json=args.json)
    return 1 if results.failed else 0


def _look(store: ObjectStore, vouching: Vouching | None, wanted: ModelRef | None, plan: Plan) -> Subject | FloeError:
    """What there is to read. A model that was asked for and cannot be had is an error, before anything is measured."""
    from floe.selfbench.subject import Subject, look  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.catalog import Catalog  # noqa: PLC0415 - likewise
    from floe.store.index import open_index  # noqa: PLC0415 - likewise

    if wanted is None and plan.parts == ("disk",):
        return Subject(None, ())
    try:
        with closing(open_index("none")) as index:
            return look(Catalog(store, index, vouching), wanted, plan.size)
    except FloeError as error:
        if wanted is not None:
            raise
        return error


def _announcement(settings: Settings, plan: Plan) -> str:
    said = [f"bench: about {plan.seconds:g} s"]
    if plan.downloaded:
        said.append(f"reads at most {format_size(plan.downloaded)} of {settings.store.partition('?')[0]}")
    if plan.space:
        said.append(f"takes at most {format_size(plan.space)} of {settings.cache_dir} and gives it back")
    wrote = f"puts {format_size(plan.upload_bytes)} into the store and removes it" if plan.write else ""
    return ", ".join([*said, wrote or "writes nothing to the store"])


def _check_disk(settings: Settings, plan: Plan) -> None:
    """NoSpaceError, AccessDeniedError: the cache disk, looked at where the directory would be when it is not there."""
    place = settings.cache_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    disk = os.statvfs(place)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    reserve = settings.cache_min_free.of(total)
    if plan.space > max(0, free - reserve):
        raise NoSpaceError(
            f"{settings.cache_dir} has {format_size(free)} free, of which cache_min_free keeps {format_size(reserve)}; "
            f"floe bench would take {format_size(plan.space)}",
            hint="give a smaller --size, or another --cache-dir",
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise AccessDeniedError(f"cannot write to {place}", hint="run as root, or give another --cache-dir")


def _node(settings: Settings, scratch: Scratch, *, made: bool) -> Node:
    """The private node. Start-up profiles are off: what a bench reads is nobody's start."""
    from floe.selfbench.mounted import Node  # noqa: PLC0415 - lazy: keeps --help fast

    own = replace(
        settings,
        store=f"file://{scratch.root}/store" if made else settings.store,
        index="none",
        cache_dir=scratch.root / "cache",
        cache_dirs=(),
        run_dir=scratch.run_dir,
        root=scratch.root / "root",
        read_deadline=min(settings.read_deadline, _PATIENCE),
        profiles="off",
        trusted_keys=TrustedKeys() if made else settings.trusted_keys,
    )
    mounting = own.as_flags(*READING, *MOUNTING, *TRUSTING)
    return Node(own.as_flags(*_NODE), [flag for flag in mounting if flag != "--config="])


def _say(part: str) -> None:
    if sys.stderr.isatty():
        output.note(f"bench: {part} ...")


def _terminable() -> AbstractContextManager[None]:
    """SIGTERM and a closed terminal clear up as Ctrl-C does."""
    return _handled(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP)


def _undisturbed() -> AbstractContextManager[None]:
    """Clearing up is not interrupted: it takes seconds, and what it leaves would stay until the next run."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _handled(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
