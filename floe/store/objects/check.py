"""What may be done with a store, found out by doing it: every operation that a reader or a writer needs.

Objects of its own, below `checks/`, are all that it writes, and it removes them. Who may not delete leaves two, of a few
KiB, which the next check overwrites.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from floe.store import layout
from floe.store.errors import (
    AccessDeniedError,
    ConflictError,
    CredentialsExpiredError,
    FloeError,
    NotFoundError,
    StoreMissingError,
)
from floe.store.objects.answers import STRANGER
from floe.store.objects.base import ObjectStore
from floe.store.objects.multipart import Body, Uploads, drop_abandoned
from floe.store.objects.permissions import (
    ABORT,
    CONDITIONAL,
    DELETE,
    GET,
    LIST,
    MULTIPART,
    OPTIONAL,
    PUT,
    RANGE,
    READER,
    REMOVER,
    RESUME,
    ROLES,
    WRITER,
    missing_policy,
    permissions,
)

T = TypeVar("T")

OK, DENIED, FAILED, UNTRIED = "ok", "denied", "failed", "untried"
HONOURED, COMPARED, IGNORED, UNKNOWN = "honoured", "compared", "ignored", "unknown"
FOLDER = "checks"
_SIZE = 4096  # bytes of a probe object


@dataclass(frozen=True)
class Finding:
    """What came of one operation. `state`: ok, denied, failed or untried; `detail`: why, in one line."""

    operation: str
    role: str
    state: str
    permissions: tuple[str, ...]
    detail: str = ""


@dataclass
class Report:
    """All of it. `conditional_puts`: honoured; compared, when the server refuses conditions; ignored; unknown.

    `missing`: a policy that allows what was denied, or None. `left`: keys of probe objects that could not be removed.
    `dropped_uploads`: multipart uploads begun days ago and now aborted; `open_uploads`: younger ones, left alone.
    """

    url: str
    findings: list[Finding] = field(default_factory=list)
    conditional_puts: str = UNKNOWN
    missing: dict[str, Any] | None = None
    left: list[str] = field(default_factory=list)
    dropped_uploads: int = 0
    open_uploads: int = 0

    def satisfied(self, role: str) -> bool:
        """Whether everything that `role` needs was done; a writer reads too, and so does a remover."""
        roles = {READER, role}
        return all(f.state == OK for f in self.findings if f.role in roles and f.operation not in OPTIONAL)

    @property
    def roles(self) -> dict[str, bool]:
        """For every role, whether it is satisfied."""
        return {role: self.satisfied(role) for role in (READER, WRITER, REMOVER)}


def check_store(store: ObjectStore, uploads: Uploads | None, *, kms_key: str | None = None) -> Report:
    """Try everything on `store`; `uploads`: its multipart uploads, None for a store without any.

    Nothing that is only denied or wrong raises. NotFoundError: no such bucket or folder; UnavailableError: cannot be
    reached; AccessDeniedError: there are no credentials.
    """
    return _Check(store, uploads, kms_key).run()


class _Check:
    def __init__(self, store: ObjectStore, uploads: Uploads | None, kms_key: str | None) -> None:
        self._store = store
        self._uploads = uploads
        self._kms_key = kms_key
        self._report = Report(store.url)
        self._written: list[str] = []
        self._kms_denied = False
        self._denied: list[str] = []

    def run(self) -> Report:
        self._try(LIST, lambda: next(iter(self._store.list("refs")), None))
        new = f"{FOLDER}/{uuid.uuid4().hex}"
        may_delete = self._try(DELETE, lambda: self._delete(new))
        key = new if may_delete else f"{FOLDER}/object"
        data = os.urandom(_SIZE)
        try:
            wrote = self._try(PUT, lambda: self._put(key, data))
            self._check_conditions(key, wrote=bool(wrote))
            self._check_reading(key if wrote else layout.STORE_KEY, wrote=bool(wrote))
            if self._uploads is not None:
                self._check_uploads(self._uploads, f"{key}-parts")
        finally:
            self._clean_up()
        denied = self._denied
        self._report.missing = missing_policy(
            self._store.url, denied, kms_key=self._kms_key, kms_denied=self._kms_denied
        )
        self._report.findings.sort(key=lambda finding: list(ROLES).index(finding.operation))
        return self._report

    def _try(self, operation: str, work: Callable[[], T]) -> T | None:
        """What `work` returns, noted as ok; None, noted, when it is denied or fails."""
        try:
            done = work()
        except CredentialsExpiredError:
            raise
        except AccessDeniedError as error:
            if any(sign in str(error) for sign in ("no credentials", *STRANGER)):
                raise
            if "kms:" in str(error):  # AWS names the permission on the key that is missing
                self._kms_denied = True
            else:
                self._denied.append(operation)
            self._note(operation, DENIED, str(error))
        except StoreMissingError:
            raise
        except FloeError as error:
            if error.retryable:
                raise
            self._note(operation, FAILED, str(error))
        else:
            self._note(operation, OK)
            return done
        return None

    def _note(self, operation: str, state: str, detail: str = "") -> None:
        named = permissions(self._store.url, operation)
        self._report.findings.append(Finding(operation, ROLES[operation], state, named, detail))

    def _delete(self, key: str) -> bool:
        self._store.delete(key)
        return True

    def _put(self, key: str, data: bytes) -> bool:
        self._written.append(key)
        self._store.put(key, data)
        return True

    def _check_conditions(self, key: str, *, wrote: bool) -> None:
        if not wrote:
            self._note(CONDITIONAL, UNTRIED, "nothing could be put")
            return
        try:
            version = self._store.head(key).version
        except AccessDeniedError:
            self._note(CONDITIONAL, UNTRIED, "what was put cannot be read back")
            return

        def try_all() -> str:
            self._store.put_if(key, os.urandom(_SIZE), version)
            if not (self._conflicts(key, None) and self._conflicts(key, version)):
                return IGNORED
            # The store itself compares where the server does not; it knows that after the first refusal.
            bare = getattr(self._store, "inner", self._store)
            return COMPARED if getattr(bare, "refuses_conditions", False) else HONOURED

        self._report.conditional_puts = self._try(CONDITIONAL, try_all) or UNKNOWN

    def _conflicts(self, key: str, version: str | None) -> bool:
        try:
            self._store.put_if(key, b"must not be written", version)
        except ConflictError:
            return True
        return False

    def _check_reading(self, key: str, *, wrote: bool) -> None:
        def read_all() -> bool:
            return len(self._store.get(key)) > 0

        def read_range() -> bool:
            size = self._store.head(key).size
            whole = bytes(self._store.get(key))
            part = bytes(self._store.get(key, 1, size - 2))
            if part != whole[1 : size - 1]:
                raise FloeError(f"bytes 1 to {size - 1} of {key} are not what the whole object says")
            return True

        if not wrote and LIST not in self._denied:
            try:
                self._store.head(key)
            except StoreMissingError:
                raise
            except NotFoundError:
                for operation in (GET, RANGE):
                    self._note(operation, UNTRIED, "the store is empty, and nothing could be put into it")
                return
            except AccessDeniedError:
                pass
        self._try(GET, read_all)
        self._try(RANGE, read_range)

    def _check_uploads(self, uploads: Uploads, key: str) -> None:
        data = os.urandom(_SIZE)
        upload = ""

        def go_on() -> bool:
            found = [known for known in uploads.find(key) if known.id == upload]
            if not found or [part.number for part in uploads.parts(key, upload)] != [1]:
                raise FloeError("the server does not tell what it has of an upload")
            return True

        def send() -> bool:
            nonlocal upload
            upload = uploads.create(key)
            part = uploads.put(key, upload, 1, Body(data))
            self._try(RESUME, go_on)
            self._written.append(key)
            uploads.complete(key, upload, [part])
            upload = ""
            return True

        def drop() -> bool:
            uploads.abort(key, uploads.create(key))
            return True

        sent = self._try(MULTIPART, send)
        if upload:
            with suppress(FloeError):
                uploads.abort(key, upload)
        if sent:
            self._try(ABORT, drop)
        for operation in (RESUME, ABORT):
            if operation not in {finding.operation for finding in self._report.findings}:
                self._note(operation, UNTRIED, "nothing could be uploaded")
        with suppress(FloeError):  # who may not ask has been told so
            self._report.dropped_uploads, self._report.open_uploads = drop_abandoned(uploads, "packs/")

    def _clean_up(self) -> None:
        for key in self._written:
            try:
                self._store.delete(key)
            except FloeError:
                with suppress(FloeError):
                    self._store.head(key)
                    self._report.left.append(key)
