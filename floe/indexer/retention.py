"""Records follow the registry: an image that is deleted there loses its record here, after a grace period.

Only a registry that answers, and says twice that it does not know the manifest, first and after the grace period, has deleted
it. One that cannot be reached, refuses, or answers anything else has said nothing; and one answer that the manifest is there
begins the grace period anew.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from floe.ingest.oci.references import RegistryRef, parse_image_ref
from floe.ingest.oci.registry import Registry
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, FloeError, NotFoundError, UnavailableError
from floe.store.index.jobs import Job, Queue
from floe.store.records import ImageRecord
from floe.store.refs import replace_unchanged

_log = logging.getLogger(__name__)
Asks = Callable[[RegistryRef, bool, Sequence[Path]], bool]


@dataclass
class Report:
    """What a sweep found: images by repository `asked` for, `missing` and `unanswered` ones; `names` and `records` removed.

    `away`: hosts that could not be reached, which are not asked again.
    """

    asked: int = 0
    missing: int = 0
    unanswered: int = 0
    names: int = 0
    records: int = 0
    away: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        away = f"; {', '.join(sorted(self.away))} could not be reached" if self.away else ""
        return (
            f"{self.asked} images were looked up in their registries, {self.missing} are missing there, {self.unanswered} "
            f"were not answered for; {self.names} names and {self.records} records were removed{away}"
        )


def lacks(ref: RegistryRef, plain_http: bool, registry_config: Sequence[Path]) -> bool:  # noqa: FBT001 - see Asks
    """Whether the registry says that it has deleted `ref`; see Registry.lacks_manifest."""
    with contextlib.closing(Registry(ref, plain_http=plain_http, registry_config=registry_config)) as registry:
        return registry.lacks_manifest()


@dataclass(frozen=True)
class Retention:
    """`grace`: seconds for which an image keeps its record; `asks` is `lacks` but in tests."""

    catalog: Catalog
    queue: Queue
    grace: float
    registry_config: Sequence[Path] = ()
    asks: Asks = lacks

    def sweep(self, is_over: Callable[[], bool] = lambda: False) -> Report:
        """Look every image up in its registries, until `is_over`. Raises the store's and the queue's errors; a registry's are only logged.

        A host that cannot be reached is asked no more in this sweep: there may be thousands of images of it.
        """
        report = Report()
        records = list(self.catalog.images())
        # Else a repository that fails alone would keep those behind it from ever being asked for.
        random.shuffle(records)
        for record in records:
            if is_over():
                break
            self._review(record, report, plain_http=False)
        return report

    def review(self, job: Job) -> None:
        """What a registry said that it deleted, looked up there: its grace period begins."""
        try:
            record = self.catalog.image(job.ref.rpartition("@")[2])
        except (NotFoundError, BadInputError):
            return  # an index of several platforms, or never indexed
        self._review(record, Report(), plain_http=job.plain_http)

    def _review(self, record: ImageRecord, report: Report, *, plain_http: bool) -> None:
        gone: list[str] = []
        for ref, names in _by_repository(record).items():
            report.asked += 1
            if ref.host in report.away:
                report.unanswered += 1
                continue
            try:
                missing = self.asks(ref, plain_http, self.registry_config)
            except FloeError as error:
                _log.warning("%s stays: %s", ref, error)
                report.unanswered += 1
                if isinstance(error, UnavailableError):
                    report.away.add(ref.host)
                continue
            report.missing += missing
            if self._is_due(ref, missing=missing):
                gone += names
        if gone:
            self._forget(record, gone, report)

    def _is_due(self, ref: RegistryRef, *, missing: bool) -> bool:
        """Whether an image, missing in its registry or not, was so when the grace period began and is so after it."""
        since, now = self.queue.missing_since(str(ref)), time.time()
        if missing and since is None:
            _log.info("%s is missing in its registry; it keeps its record for %.0f s", ref, self.grace)
            self.queue.set_missing(str(ref), now)
        elif not missing and since is not None:
            self.queue.set_missing(str(ref), None)
        return missing and since is not None and now - since >= self.grace

    def _forget(self, record: ImageRecord, gone: Sequence[str], report: Report) -> None:
        """Take the names `gone` off; the record as it was read, or not: what was indexed meanwhile is asked for next time."""
        left = tuple(name for name in record.names if name not in gone)
        if left:
            key = layout.image_ref_key(record.manifest_digest)
            removed = replace_unchanged(self.catalog.store, key, record, replace(record, names=left))
        else:
            removed = self.catalog.forget_image(record)
            report.records += removed
        if not removed:
            _log.info("%s was changed meanwhile and stays until the next look", record.manifest_digest)
            return
        report.names += len(gone)
        for ref in _by_repository(replace(record, names=tuple(gone))):
            self.queue.set_missing(str(ref), None)
        _log.info("%s: %s no longer in its registry", record.manifest_digest, ", ".join(gone))


def _by_repository(record: ImageRecord) -> dict[RegistryRef, list[str]]:
    """The image by digest in each repository that it has names in, with those names; folders and files cannot be asked."""
    found: dict[RegistryRef, list[str]] = {}
    for name in record.names:
        with contextlib.suppress(BadInputError):
            ref = parse_image_ref(name)
            if isinstance(ref, RegistryRef):
                found.setdefault(RegistryRef(ref.host, ref.repository, None, record.manifest_digest), []).append(name)
    return found
