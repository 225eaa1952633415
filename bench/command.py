"""What every benchmark's command line has in common: its options, its folder, its output."""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.report import Results


def parser(name: str, doc: str | None, *, rounds: int, free: str) -> argparse.ArgumentParser:
    """The options of `python -m bench.NAME`; its folder needs `free` of disk."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"rounds of each workload (default {rounds})")
    made.add_argument("--dir", type=Path, default=Path("/var/tmp"), help=f"where to work; a real disk, {free} free")
    made.add_argument("--output", type=Path, help=f"write JSON to this file too, e.g. bench/results/{name}.json")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


@contextmanager
def folder(parent: Path | None) -> Iterator[Path]:
    """A folder to work in below `parent`, gone afterwards, also when the benchmark is terminated."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is mounted is unmounted then, too
    work = Path(tempfile.mkdtemp(prefix="floe-bench-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def say(text: str) -> None:
    """What is done now, for who looks on at a terminal."""
    if sys.stderr.isatty():
        print(f"bench: {text}", file=sys.stderr)


def show(options: argparse.Namespace, found: Any, text: str) -> None:
    """Print `found` as JSON or `text`, as the options say, and keep the JSON where they want it."""
    document = json.dumps(found, indent=1)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(document + "\n")
    print(document if options.json else text)


def run(options: argparse.Namespace, measure: Callable[[ExitStack, Path], Results]) -> int:
    """Show what `measure` finds out in a folder of its own; what it puts on the stack is undone before that goes."""
    with folder(options.dir) as work, ExitStack() as stack:
        results = measure(stack, work)
    show(options, results.as_json(), results.as_text())
    return 0
