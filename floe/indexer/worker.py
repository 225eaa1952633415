"""A worker: takes jobs, does them, and says what became of them.

A job is acknowledged after what it is for is in the store, so a worker may die anywhere: another one takes the job when the
first has been silent for a while, finds what is stored already, and does the rest. A job that ends its workers again and again
is given up, as is one that fails for a reason that will not pass, or too often.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from floe.indexer.held import Held, Watch
from floe.indexer.retention import Retention
from floe.indexer.sweeps import Sweeps
from floe.ingest.oci.image import NEW_LAYERS, IndexResult, index_resolved, open_source, told_what_to_do
from floe.ingest.oci.layerplan import ALL_LAYERS, NO_LAYERS, missing_layers
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, Source, resolve
from floe.store.catalog import Catalog
from floe.store.errors import (
    BadInputError,
    CancelledError,
    DamagedError,
    FloeError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.imagepolicy import ImageRule, rule_for
from floe.store.index.jobs import CHECK, DONE, OUTCOMES, REFUSED, UNCHANGED, Job, Lease, Queue, Task, shown_error

_log = logging.getLogger(__name__)
TRIES = 9  # attempts that fail before a job is given up: 15 to 20 minutes, by the pauses below
DELIVERIES = 4  # workers that fall silent over a job before it is given up
_RENEWALS = 6  # of a job while its lease lasts: as for a lease in redis/leases.py
_IDLE = 1.0  # seconds between two looks for a job
_DELAY, _DELAY_MAX = 5.0, 600.0  # seconds before the second attempt, doubled up to
_SHORTEST = 0.75  # of such a pause, which is drawn by lot: what failed together is not tried again together
_ENDURED = 60.0  # seconds without the queue after which who is to end when nothing waits gives up
_PATIENCE = 1.5  # leases that layers of somebody else's are waited for: a dead one's has ended by then
PUT_OFF, RETRIED, FAILED, GIVEN_BACK = "put_off", "retried", "failed", "given_back"
BECAME = (*OUTCOMES, PUT_OFF, RETRIED, FAILED, GIVEN_BACK)
"""What this worker said of a job: one of OUTCOMES; to be done after others are; to be tried again; given up; given back when it was stopped."""
_PERMANENT = (BadInputError, UnsupportedError, DamagedError)


class _Elsewhere(Exception):  # noqa: N818 - no error
    """Somebody else is storing layers of the image, and takes their time."""


@dataclass(frozen=True)
class IndexerConfig:
    """`rules` say what is indexed. `grace`: seconds after which an image that its registry does not have loses its record; 0: never.

    `sweep`: seconds between two looks for such images, by one indexer for all.
    """

    spool_dir: Path
    workers: int
    rules: tuple[ImageRule, ...] = ()
    registry_config: Sequence[Path] = ()
    grace: float = 0.0
    sweep: float = 3600.0


class Indexer:
    """One worker; `stop` ends it behind what it does at that moment, which is given back. `became`: its jobs by BECAME."""

    def __init__(self, catalog: Catalog, queue: Queue, config: IndexerConfig, stop: threading.Event) -> None:
        self._catalog, self._queue, self._config, self._stop = catalog, queue, config, stop
        self._retention = Retention(catalog, queue, config.grace, config.registry_config)
        self._sweeps = Sweeps(self._retention, queue, config.sweep, stop) if config.grace else None
        self.became: Counter[str] = Counter(dict.fromkeys(BECAME, 0))
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    def run(self, *, drain: bool = False) -> None:
        """Work until `stop` is set; with `drain` until nothing waits that could be done now, then sweep if it is its turn.

        UnavailableError, with `drain`: the queue cannot be asked, for a reason that stays or for a minute.
        """
        if drain:
            self._drain()
        else:
            self._serve()
        with contextlib.suppress(UnavailableError):
            self._queue.leave(self.name)

    def _serve(self) -> None:
        if self._sweeps is not None:
            self._sweeps.start()
        pause = _IDLE
        while not self._stop.is_set():
            try:
                worked = self.run_one()
                pause = _IDLE
                if worked:
                    continue
            except UnavailableError as error:
                pause = self._away(error, pause)
            self._stop.wait(pause * random.uniform(0.5, 1.0))
        if self._sweeps is not None:
            self._sweeps.end()

    def _drain(self) -> None:
        pause, until = _IDLE, math.inf
        while not self._stop.is_set():
            try:
                if not self.run_one():
                    if self._sweeps is not None:
                        self._sweeps.turn()
                    return
                pause, until = _IDLE, math.inf
            except UnavailableError as error:
                until = min(until, time.monotonic() + _ENDURED)
                if not error.retryable or time.monotonic() > until:
                    raise
                pause = self._away(error, pause)
                self._stop.wait(pause * random.uniform(0.5, 1.0))

    @staticmethod
    def _away(error: UnavailableError, pause: float) -> float:
        """Say that the queue cannot be asked; the next pause, in seconds."""
        _log.warning("%s", error)
        return min(2 * pause, 30.0)

    def run_one(self) -> bool:
        """Do one job; False when there is none. UnavailableError when the queue cannot be asked."""
        task = self._queue.take(self.name)
        if task is None:
            return False
        if task.job is None:
            _log.error("job %s is none that this Floe knows, and is given up", task.id)
            self._settle(FAILED, lambda: self._queue.bury(self.name, task, None))
        elif task.deliveries > DELIVERIES:
            died = f"{task.deliveries - 1} indexers fell silent over it"
            self._give_up(task, task.job.failed(f"{died}; the last error: {task.job.error or 'none'}"))
        else:
            self._do(task, task.job)
        return True

    def _do(self, task: Task, job: Job) -> None:
        with Held(self._queue, self.name, task, self._queue.lease_seconds / _RENEWALS) as held:
            watch = Watch(held, self._stop)
            try:
                outcome = self._work(job, watch)
            except _Elsewhere as error:
                self._put_off(task, job, str(error))
                return
            except Exception as error:  # whatever an image makes of us, the next job is done
                self._failed(task, job, error, held)
                return
        self._settle(outcome, lambda: self._queue.finish(self.name, task, outcome))

    def _work(self, job: Job, watch: Watch) -> str:
        if job.action == CHECK:
            if self._config.grace:
                self._retention.review(job)
            return DONE
        rule = rule_for(job.ref, self._config.rules)
        if rule is None:
            _log.info("%s is not indexed: no policy wants it", job.ref)
            return REFUSED
        outcomes = []
        with (
            told_what_to_do(),
            contextlib.closing(
                open_source(job.ref, plain_http=job.plain_http, registry_config=self._config.registry_config)
            ) as source,
        ):
            for image in _images(source, (job.platform,) if job.platform else rule.platforms):
                watch.check()
                outcomes.append(self._index(job, rule, image, watch))
        return next((one for one in (DONE, UNCHANGED) if one in outcomes), REFUSED)

    def _index(self, job: Job, rule: ImageRule, image: Image, watch: Watch) -> str:
        size = sum(layer.size for layer in image.manifest.layers)
        if not rule.fits_size(size):
            _log.info("%s (%s) is not indexed: no policy wants %d bytes", job.ref, image.platform, size)
            return REFUSED
        known = self._is_known(image)
        began = time.monotonic()
        with self._turn(image, watch) as lease:
            watch.lease = lease
            result = index_resolved(
                self._catalog,
                image,
                spool_dir=self._config.spool_dir,
                workers=self._config.workers,
                progress=watch,
                profile=job.lay_out if job.lay_out in (NEW_LAYERS, ALL_LAYERS, NO_LAYERS) else NEW_LAYERS,
            )
            watch.lease = None
        _say(job, image, result, time.monotonic() - began)
        return UNCHANGED if known and not result.new_layers and not result.laid_out_layers else DONE

    def _is_known(self, image: Image) -> bool:
        try:
            return image.name in self._catalog.image(image.manifest.digest).names
        except NotFoundError:
            return False

    @contextlib.contextmanager
    def _turn(self, image: Image, watch: Watch) -> Iterator[Lease | None]:
        """Nobody else in the fleet stores the image's missing layers meanwhile. _Elsewhere: somebody does, for long."""
        until = time.monotonic() + _PATIENCE * self._queue.lease_seconds
        while True:
            missing = missing_layers(self._catalog, image)
            if not missing:
                yield None
                return
            lease = self._queue.try_lease(missing, self._queue.lease_seconds)
            if lease is not None:
                try:
                    yield lease
                finally:
                    lease.release()
                return
            watch.check()
            if time.monotonic() > until:
                raise _Elsewhere(f"waits for others, who are storing layers of it: {len(missing)} are missing")
            self._stop.wait(_IDLE)

    def _put_off(self, task: Task, job: Job, why: str) -> None:
        """Let others be done first, and do something else meanwhile; no attempt is counted."""
        delay = self._queue.lease_seconds * random.uniform(0.5, 1.0)
        _log.info("%s %s; it is tried again in %.0f s", job.ref, why, delay)
        self._settle(PUT_OFF, lambda: self._queue.retry(self.name, task, replace(job, error=why), delay))

    def _failed(self, task: Task, job: Job, error: Exception, held: Held) -> None:
        if held.lost:
            _log.warning("%s: another indexer has it by now: %s", job.ref, error)
            return
        if self._stop.is_set() and isinstance(error, CancelledError):
            self._settle(GIVEN_BACK, lambda: self._queue.give_back(self.name, task))
            return
        after = job.failed(shown_error(error))
        if isinstance(error, _PERMANENT) or after.tries >= TRIES:
            self._give_up(task, after)
            return
        delay = min(_DELAY_MAX, _DELAY * 2**job.tries) * random.uniform(_SHORTEST, 1.0)
        if isinstance(error, FloeError):
            _log.warning("%s failed and is tried again in %.0f s: %s", job.ref, delay, after.error)
        else:
            _log.exception("%s failed and is tried again in %.0f s", job.ref, delay, exc_info=error)
        self._settle(RETRIED, lambda: self._queue.retry(self.name, task, after, delay))

    def _give_up(self, task: Task, job: Job) -> None:
        _log.error("%s is given up: %s", job.ref, job.error)
        self._settle(FAILED, lambda: self._queue.bury(self.name, task, job))

    def _settle(self, became: str, say: Callable[[], bool]) -> None:
        """Say what became of a job (one of BECAME), for as long as it is ours; whoever takes it over then finds it done."""
        until = time.monotonic() + self._queue.lease_seconds
        while True:
            try:
                if say():
                    self.became[became] += 1
                else:
                    _log.info("another indexer has taken the job over")
            except UnavailableError as error:
                if not error.retryable or time.monotonic() + _IDLE > until:
                    raise
                time.sleep(_IDLE)
            else:
                return


def _images(source: Source, platforms: Sequence[str]) -> Iterator[Image]:
    """The image for each platform that it has; NotFoundError when it has none of them."""
    found = 0
    missing: NotFoundError | None = None
    for text in platforms or ("",):
        try:
            image = resolve(source, Platform.parse(text) if text else None)
        except NotFoundError as error:
            missing = error
            continue
        found += 1
        yield image
    if not found and missing is not None:
        raise missing


def _say(job: Job, image: Image, result: IndexResult, seconds: float) -> None:
    for warning in result.warnings:
        _log.warning("%s", warning)
    _log.info(
        "%s (%s) is %s: %d layers new, %d bytes in %d packs, %.1f s, asked for by %s",
        *(job.ref, image.platform, image.manifest.digest, result.new_layers, result.new_bytes, result.new_packs),
        *(seconds, job.origin),
    )
