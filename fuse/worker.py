"""The worker: serves /dev/fuse for the keeper that started it, and can be killed at any moment.

Whatever a successor needs is elsewhere: requests in the slots, node ids in packs.known, data in the cache.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import floe
from floe.fuse import descriptors, protocol
from floe.fuse.control import ControlServer, Warms
from floe.fuse.idle import IdleProcessors
from floe.fuse.known import KnownPacks
from floe.fuse.reader import LateReader
from floe.fuse.session import Session
from floe.fuse.slots import Slots
from floe.store import loglevel, process
from floe.store.errors import BusyError, FloeError, PreconditionError

_log = logging.getLogger(__name__)
_DRAIN = 3.0  # seconds that a stopping worker waits for its reads
_QUEUE_WAIT = 0.1  # seconds for what is in the kernel's queue to be taken, when somebody wants to unmount
_SWITCH_INTERVAL = 0.001  # seconds; a request must not wait 5 ms for a thread that decodes


class Worker:
    """One worker's parts, and what it says of itself."""

    def __init__(
        self, run_dir: Path, reader: LateReader, fuse_fd: int, slots_fd: int, *, busy_poll: bool, patience: float
    ) -> None:
        """Claim the slots; BusyError while another worker serves."""
        self._reader = reader
        self._started = time.monotonic()
        self._slots = Slots(slots_fd)
        self._patience = patience
        self._known = KnownPacks(run_dir)
        device = descriptors.mounted_device(run_dir)
        self._connection = descriptors.connection_dir(device) if device else None
        idle = IdleProcessors() if busy_poll else None
        self.session = Session(fuse_fd, self._slots, self._known, reader, idle=idle)

    def _check_limits(self) -> None:
        """See that the kernel took max_background: it may cap what INIT asked for."""
        wanted = {
            "max_background": protocol.MAX_BACKGROUND,
            "congestion_threshold": protocol.CONGESTION_THRESHOLD,
        }
        for name, value in wanted.items():
            got = self._limit(name)
            if got is not None and got < value and self._connection is not None:
                try:
                    (self._connection / name).write_text(str(value), encoding="ascii")
                except OSError as error:
                    _log.warning("%s stays at %d: %s", name, got, error)

    def _limit(self, name: str) -> int | None:
        if self._connection is None:
            return None
        try:
            return int((self._connection / name).read_text(encoding="ascii"))
        except OSError:
            return None

    def status(self) -> dict[str, Any]:
        """The keys of `floe status` for the pack filesystem.

        pid, version (of Floe, as text), log_level (in force now), uptime (seconds), rss (bytes, peak), packs (met since the mount), inflight (reads), waiting
        (requests, the kernel's count), max_background, congestion_threshold, requests, reads, read_bytes,
        errors, interrupts, workers (since the mount), takeovers (workers that found requests of their
        predecessor), left_requests (those, all together), replayers (workers whose answers to such requests the
        kernel took), replayed (those requests), restarts (workers that ended without having been told to), silent_workers
        (those that the keeper killed because they did not answer), poisonous_requests (answered with an error because they
        ended workers), overdue_requests (because a worker had not answered them in time), counters (the reader's).
        """
        session = self.session
        workers, takeovers, left = self._slots.counters
        replayers, replayed = self._slots.replays
        counts = self._slots.counts
        return {
            "pid": os.getpid(),
            "version": floe.__version__,
            "log_level": loglevel.current(),
            "uptime": time.monotonic() - self._started,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            "packs": len(self._known),
            "inflight": session.inflight_total,
            "waiting": self._limit("waiting"),
            "max_background": self._limit("max_background"),
            "congestion_threshold": self._limit("congestion_threshold"),
            "requests": session.requests,
            "reads": session.reads,
            "read_bytes": session.read_bytes,
            "errors": session.errors,
            "interrupts": session.interrupts,
            "workers": workers,
            "takeovers": takeovers,
            "left_requests": left,
            "replayers": replayers,
            "replayed": replayed,
            "restarts": counts["ended"],
            "silent_workers": counts["silent"],
            "poisonous_requests": counts["poisonous"],
            "overdue_requests": counts["overdue"],
            "counters": dict(self._reader.counters()),
        }

    def inflight(self, pack_ids: Sequence[str]) -> tuple[int, list[int]]:
        """How many reads on these packs are not answered, and the numbers of those that were taken from the kernel.

        Those in the kernel's queue count, of whatever pack they are.

        The kernel counts the queue together with all else, and hands requests out in order. So what was queued at first
        has been taken as soon as more requests were: then, or when nothing is queued, the answer is exact.
        """
        session = self.session
        queued = first = self._queued()
        taken = session.requests
        deadline = time.monotonic() + _QUEUE_WAIT
        while queued > 0 and session.requests - taken <= first:
            if time.monotonic() >= deadline:
                taken_reads = session.inflight(pack_ids)
                return len(taken_reads) + queued, taken_reads
            time.sleep(0.001)
            queued = self._queued()
        reads = session.inflight(pack_ids)
        return len(reads), reads

    def _queued(self) -> int:
        """Requests that no thread has taken yet, or perhaps some more: those being taken or answered right now."""
        waiting = self._limit("waiting") or 0
        return waiting - self.session.inflight_total

    def start(self, threads: int) -> None:
        """Answer what the predecessor left, then serve with `threads` daemon threads; returns once INIT is answered."""
        self._slots.begin(self._patience)
        left = self.session.answer_left()
        if left:
            _log.info("took over %d requests that the last worker left", left)
        for number in range(threads):
            threading.Thread(target=self.session.serve, name=f"fuse-{number}", daemon=True).start()
        self.session.initialized.wait()
        self._check_limits()


def run_worker(
    run_dir: Path,
    reader: LateReader,
    *,
    threads: int = 4,
    busy_poll: bool = True,
    patience: float = 0.0,
    mounted: Callable[[str, Sequence[str]], object] = lambda _tree, _packs: None,
    expected: Callable[[str, int], object] = lambda _tree, _nbytes: None,
    unexpected: Callable[[str], object] = lambda _tree: None,
    started: Callable[[str, str, Sequence[str], str], object] = lambda _key, _name, _trees, _traceparent: None,
    warming: Warms | None = None,
    frames: Callable[[Sequence[str]], dict[str, Any]] = lambda _packs: {"packs": {}, "left": []},
    more_status: Callable[[], dict[str, Any]] = dict,
) -> int:
    """Serve the mount whose descriptors the keeper passed, until SIGTERM (0) or its end (EXIT_GONE).

    `busy_poll`: see session.py. `patience`: seconds within which `reader` answers, for the watchdog; 0: it does not say.
    `mounted` is told trees and their packs as they are mounted, `expected` trees that are going to be, and how many
    bytes of them to fetch, `unexpected` those that are not after all, `started` what begins to use trees (see packfs_control.started).
    `warming` takes warm orders. `frames`: see FrameMaps.answer. `more_status` adds to `Worker.status`.
    The caller closes `reader` afterwards; reads that this ends are not answered but left to the next worker.
    Called in the main thread. Errors in starting are logged and give an exit code too.
    """
    try:
        fuse_fd, slots_fd = (int(os.environ.pop(key)) for key in (descriptors.FUSE_FD_ENV, descriptors.SLOTS_FD_ENV))
        ready_fd = int(os.environ.pop(descriptors.READY_FD_ENV, "-1"))
    except (KeyError, ValueError):
        _log.error("the worker is started by `floe packfs`, not by hand")
        return 2
    for fd in (fuse_fd, slots_fd):
        os.set_inheritable(fd, False)
    wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(wake, True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.write(waker, b"t"))
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        process.refuse_own_mount(run_dir)
        for problem in process.harden():
            _log.debug("%s", problem)
        worker = Worker(run_dir, reader, fuse_fd, slots_fd, busy_poll=busy_poll, patience=patience)
    except BusyError as error:
        _log.error("%s", error)
        return descriptors.EXIT_BUSY
    except PreconditionError as error:
        _log.error("%s; %s", error, error.hint)
        return 1
    except FloeError:
        _log.exception("the worker cannot start")
        return 1
    session = worker.session

    def gone() -> None:
        session.initialized.set()  # it will never be
        os.write(waker, b"g")

    session.on_gone = gone
    gc.collect()
    gc.freeze()
    worker.start(threads)

    def status() -> dict[str, Any]:
        return {**worker.status(), **more_status()}

    control = ControlServer(
        run_dir,
        status=status,
        inflight=worker.inflight,
        mounted=mounted,
        expected=expected,
        unexpected=unexpected,
        started=started,
        warming=warming,
        frames=frames,
    )
    if ready_fd >= 0:
        _tell(ready_fd)
    why = os.read(wake, 1)
    session.stop(0.0 if why == b"g" else _DRAIN)
    control.close()
    return descriptors.EXIT_GONE if why == b"g" else 0


def _tell(ready_fd: int) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(ready_fd, b"R")
    except OSError:
        pass  # the keeper that started us is dead; another one will find us
    finally:
        os.close(ready_fd)
