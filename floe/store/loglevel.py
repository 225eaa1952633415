"""How much daemons log, changed while they run: a small file in the run directory that each looks at, and that ends by itself.

A file and not a request: a worker that takes over from another goes by it too, and a daemon of an earlier version is not hurt.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error")
FILE = "log-level.json"
_LOOK = 0.5  # seconds between two looks at the file
_log = logging.getLogger(__name__)


def current() -> str:
    """The level in force in this process."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()


def wish(run_dir: Path, level: str, seconds: float) -> None:
    """Have the daemons of `run_dir` log at `level` for `seconds` from now. OSError."""
    path = run_dir / FILE
    temporary = run_dir / f"{FILE}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"level": level, "until": time.time() + seconds}, file)
    temporary.rename(path)


def unwish(run_dir: Path) -> None:
    """Have them log again as their settings say. OSError."""
    (run_dir / FILE).unlink(missing_ok=True)


def wished(run_dir: Path) -> tuple[str, float] | None:
    """The level that is wished for, and until when (seconds since 1970); None when it is over, or nobody wishes anything."""
    try:
        found = json.loads((run_dir / FILE).read_bytes())
        level, until = found["level"], float(found["until"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (level, until) if level in LEVELS and until > time.time() else None


class Follower:
    """Sets the level of this process's logs to what is wished for in `run_dir`, else to what it was, until `close`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._own = current()
        self._stopping = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._run, name="floe-log-level", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK):
            self._look()

    def _look(self) -> None:
        found = wished(self._run_dir)
        level = found[0] if found is not None else self._own
        before = current()
        if level == before:
            return
        # Said at the level that is the more talkative, so that the log tells of both.
        logging.getLogger().setLevel(min(getattr(logging, name.upper()) for name in (level, before)))
        _log.info("logs are of level %s and above from now on, before %s", level, before)
        logging.getLogger().setLevel(level.upper())
