"""Runs mount operations in processes of their own, each with a deadline.

A process that does not end in time is killed; one that the kernel will not let go (D state) is left behind, remembered
by its pid until it is gone, and never waited for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floe.store.errors import DeadlineError, UnavailableError
from floe.store.process import start_time

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# -S: site-packages are not needed and cost half of the start; -m finds the package in the working directory.
HELPER_COMMAND = (sys.executable, "-E", "-S", "-s", "-m", "floe.mount.helper")
# The portable mount: answers like the mount process, and leaves a server behind. Named, since floe.fuse is not imported.
PORTABLE_COMMAND = (sys.executable, "-m", "floe.fuse.portable")
_GRACE = 0.3  # seconds a killed process gets to be gone


class OperationError(OSError):
    """An operation was refused: `errno`, `step` (what failed, on what), `log` (the kernel's own words).

    `hint` is what the portable mount knows better than the errno.
    """

    def __init__(self, code: int, step: str, log: Sequence[str], hint: str = "") -> None:
        super().__init__(code, os.strerror(code))
        self.step = step
        self.log = tuple(log)
        self.hint = hint

    def __str__(self) -> str:
        words = "; ".join(self.log)
        return f"{self.step}: {self.strerror}" + (f" ({words})" if words else "")


class MountRunner:
    """Thread-safe. `deadline` in seconds holds for one operation; `command` is the program that does it.

    In the folder `stuck` a file for each process left behind tells other programs of it.
    """

    def __init__(self, deadline: float, stuck: Path, command: Sequence[str] = HELPER_COMMAND) -> None:
        self._deadline = deadline
        self._folder = stuck
        self._command = tuple(command)
        self._lock = threading.Lock()  # guards _left
        self._left: list[subprocess.Popen[bytes]] = []

    def run(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """The operation's answer. OperationError when the kernel refused; DeadlineError; UnavailableError."""
        what = f"{operation} {arguments.get('target') or arguments.get('source') or ''}".strip()
        request = json.dumps({"op": operation, **arguments}).encode()
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=_PACKAGE_ROOT,
                start_new_session=True,  # a Ctrl-C meant for the caller must not end a mount halfway
            )
        except OSError as error:
            hint = "free some memory or processes, then try again"
            raise UnavailableError(f"{what}: no process can be started: {error}", hint=hint) from error
        try:
            output, errors = process.communicate(request, timeout=self._deadline)
        except subprocess.TimeoutExpired:
            raise self._give_up(process, what) from None
        except BaseException:
            self._give_up(process, what)
            raise
        answer = None
        with contextlib.suppress(ValueError):
            answer = json.loads(output)
        if process.returncode or not isinstance(answer, dict):
            last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise UnavailableError(f"{what}: the mount process ended with status {process.returncode}: {last}")
        if answer.get("errno") and "step" in answer:
            raise OperationError(answer["errno"], answer["step"], answer["log"], answer.get("hint", ""))
        return answer

    def stuck(self) -> dict[int, str]:
        """Mount processes of anyone that were given up and are still there: pid -> what they were told to do."""
        with self._lock:
            self._left = [process for process in self._left if process.poll() is None]
        found = {}
        for path in self._folder.glob("*.json"):
            try:
                data = json.loads(path.read_bytes())
            except (FileNotFoundError, ValueError):
                continue
            if data["started"] == start_time(int(path.stem)):
                found[int(path.stem)] = str(data["what"])
            else:
                path.unlink(missing_ok=True)
        return found

    def hangs(self, target: str) -> bool:
        """Whether one of those was told to do something with `target`, which it may still do."""
        return any(what.endswith(" " + target) for what in self.stuck().values())

    def _give_up(self, process: subprocess.Popen[bytes], what: str) -> DeadlineError:
        process.kill()
        try:
            process.wait(_GRACE)
            rest = "it was ended"
        except subprocess.TimeoutExpired:
            with self._lock:
                self._left.append(process)
            note = json.dumps({"what": what, "started": start_time(process.pid)})
            with contextlib.suppress(OSError):
                (self._folder / f"{process.pid}.json").write_text(note)
            rest = f"its process {process.pid} hangs in the kernel and is left behind"
            _log.error("%s did not end within %g s; %s", what, self._deadline, rest)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return DeadlineError(
            f"{what} did not end within {self._deadline:g} s; {rest}",
            hint="look at `floe status` and the disk below the cache, then try again",
        )
