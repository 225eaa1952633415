"""`make fuzz`: bytes for every parser until the time is up, guided by coverage; see tests/fuzz/targets.py.

    PYTHONPATH=tests .venv/bin/python tests/fuzz/runner.py [TARGET...] [--seconds 600] [--work FOLDER] [--keep]

`--seconds` are of processor time, for each target. Atheris does it where the extra `fuzz` is installed, else a plain mutator
without coverage. What was found is printed and left in the work folder; exit code 1 then. `--keep` brings the smallest
inputs that together reach all that was reached into tests/fuzz/corpus, which the ordinary tests replay.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from fuzz.reach import Target, lines_of

CORPUS = Path(__file__).parent / "corpus"
KEPT, KEPT_BYTES = 40, 160 << 10  # files and bytes of a target's corpus
_MEMORY = 1024  # MiB that a target may take in all, the interpreter and its library included
_SLOW = 10  # seconds of processor time for one input


def main() -> int:
    """Fuzz the targets one after another, each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "floe-fuzz")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.disable()  # every damaged input would be a line
    if given.inside:
        _inside(given.inside, given.seconds, given.work / given.inside)
        return 0
    targets = _targets()
    failed = False
    for name in given.targets or targets:
        if name not in targets:
            parser.error(f"there is no target {name}; there are: {', '.join(targets)}")
        work = given.work / name
        (work / "corpus").mkdir(parents=True, exist_ok=True)
        for seed in targets[name].seeds():
            _add(work / "corpus", seed)
        if given.seconds:
            command = [sys.executable, __file__, "--inside", name, f"--seconds={given.seconds}", f"--work={given.work}"]
            failed |= subprocess.run(command, check=False).returncode != 0
        if given.keep:
            _keep(name, work)
    return int(failed)


def _targets() -> Mapping[str, Target]:
    """Imported late: only what is imported under atheris's eyes tells it where it has been."""
    found: Mapping[str, Target] = importlib.import_module("fuzz.targets").TARGETS
    return found


def _add(folder: Path, data: bytes) -> None:
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def _inside(name: str, seconds: float, work: Path) -> None:
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        print(f"{name}: without atheris (pip install -e '.[fuzz]'), so without coverage", file=sys.stderr)
        _plain(name, seconds, work)
        return
    with atheris.instrument_imports(include=["floe"]):
        target = _targets()[name]
    signal.signal(signal.SIGVTALRM, _too_slow)
    count = 0
    begin = time.process_time()

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        signal.setitimer(signal.ITIMER_VIRTUAL, _SLOW)
        target.run(data)
        if not count % 64 and time.process_time() - begin >= seconds:
            _report(name, count, time.process_time() - begin, work)
            os._exit(0)

    folders = [str(work / "corpus"), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
    atheris.Setup(
        [
            name, *folders, f"-max_len={target.limit}", f"-rss_limit_mb={_MEMORY}", "-timeout=3600",
            f"-artifact_prefix={work}/found-", "-print_final_stats=1", "-verbosity=0",
        ],
        one,
    )  # fmt: skip
    atheris.Fuzz()


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"one input took {_SLOW} s of processor time")


def _plain(name: str, seconds: float, work: Path) -> None:
    """Random changes of the seeds and the corpus."""
    target = _targets()[name]
    source = random.Random(name)
    known = [path.read_bytes() for folder in (work / "corpus", CORPUS / name) for path in sorted(folder.glob("*"))]
    begin, count = time.process_time(), 0
    while time.process_time() - begin < seconds:
        data = bytearray(source.choice(known))
        for _ in range(source.randrange(1, 6)):
            at = source.randrange(len(data) + 1)
            new = source.choice((b"", b"\0", b"\xff" * 4, source.randbytes(1), source.choice(known)[at : at + 64]))
            data[at : at + source.choice((0, len(new), 4))] = new
        count += 1
        try:
            target.run(bytes(data))
        except Exception:
            _add(work, bytes(data))
            traceback.print_exc()
            sys.exit(1)
    _report(name, count, time.process_time() - begin, work)


def _report(name: str, count: int, seconds: float, work: Path) -> None:
    held = len(list((work / "corpus").glob("*")))
    print(f"{name}: {count} inputs in {seconds:.0f} s of processor time, {held} in the corpus", flush=True)


def _keep(name: str, work: Path) -> None:
    """The smallest files that reach what the whole corpus reaches, as far as they fit."""
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    left, room = KEPT - len(list(kept.glob("*"))), KEPT_BYTES - sum(path.stat().st_size for path in kept.glob("*"))
    target = _targets()[name]
    reached = set[tuple[str, int]]()
    for path in sorted(kept.glob("*")):
        reached |= lines_of(target, path.read_bytes())
    for path in sorted((work / "corpus").glob("*"), key=lambda path: (path.stat().st_size, path.name)):
        data = path.read_bytes()
        if len(data) > room or not left:
            continue
        news = lines_of(target, data) - reached
        if news:
            reached |= news
            _add(kept, data)
            left, room = left - 1, room - len(data)
    print(f"{name}: {len(list(kept.glob('*')))} inputs kept, {len(reached)} steps reached", flush=True)


if __name__ == "__main__":
    sys.exit(main())
