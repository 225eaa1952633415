"""Records that change: replaced by conditional put, listed by prefix, whatever damage is among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

from floe.store.chunkfinder import each
from floe.store.errors import ConflictError, DamagedError, FloeError, NotFoundError, StoreMissingError
from floe.store.objects.base import ObjectStore
from floe.store.records import Record, Ref

_log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
Damaged: TypeAlias = Callable[[str, FloeError], None]
"""Told the key of a record that cannot be read, and why."""

_ATTEMPTS = 20  # conditional puts lost in a row before giving up


def replace_record(store: ObjectStore, key: str, kind: type[R], change: Callable[[R | None], R]) -> tuple[R | None, R]:
    """Replace the record at `key` by `change(record or None)`; returns the one replaced and the one there now.

    A damaged record is replaced like a missing one; nothing is written when nothing changes. ConflictError when others
    change it all the time; StoreMissingError when there is no store.
    """
    for _ in range(_ATTEMPTS):
        known: R | None = None
        version: str | None = None
        try:
            data, version = store.get_versioned(key)
            known = kind.decode(data, key)
        except StoreMissingError:  # a record is no reason to make a store: a disk may not be mounted yet
            raise
        except NotFoundError:
            pass
        except DamagedError as error:
            _log.warning("%s; replaced", error)
        wanted = change(known)
        if wanted == known:
            return known, wanted
        try:
            store.put_if(key, wanted.encode(), version)
        except ConflictError:
            continue
        return known, wanted
    raise ConflictError(f"{key} in {store.url} changes faster than it can be set", hint="try again")


def replace_unchanged(store: ObjectStore, key: str, listed: R, wanted: R) -> bool:
    """Replace the record that was `listed` at `key`, unless it was changed or removed since; whether it was replaced."""
    try:
        data, version = store.get_versioned(key)
        if type(listed).decode(data, key) != listed:
            return False
        store.put_if(key, wanted.encode(), version)
    except (NotFoundError, ConflictError, DamagedError):
        return False
    return True


def remove_unchanged(store: ObjectStore, key: str, listed: Record) -> bool:
    """Remove the record that was `listed` at `key`, unless it was changed or removed since; whether it was there still.

    As for `remove_ref`: what is changed between the look and the deletion, one request later, is lost.
    """
    try:
        if type(listed).decode(store.get(key), key) != listed:
            return False
    except (NotFoundError, DamagedError):
        return False
    store.delete(key)
    return True


def remove_ref(store: ObjectStore, key: str, manifest: str) -> bool:
    """Remove the ref at `key` when it names `manifest`; whether it did.

    Object stores delete unconditionally: a ref that is set anew between the look and the deletion, one request
    later, is lost.
    """
    try:
        if Ref.decode(store.get(key), key).manifest != manifest:
            return False
    except (NotFoundError, DamagedError):
        return False
    store.delete(key)
    return True


def list_records(
    store: ObjectStore, prefix: str, kind: type[R], damaged: Damaged | None = None
) -> Iterator[tuple[str, R]]:
    """The keys and records below `prefix`. One that cannot be read is left out: logged, or told `damaged`."""

    def read(key: str) -> tuple[str, R | FloeError] | None:
        try:
            return key, kind.decode(store.get(key), key)
        except NotFoundError:  # removed since it was listed
            return None
        except FloeError as error:
            if error.retryable:
                raise
            return key, error

    for key, found in filter(None, each(read, [info.key for info in store.list(prefix)])):
        if not isinstance(found, FloeError):
            yield key, found
        elif damaged is not None:
            damaged(key, found)
        else:
            _log.warning("%s; left out", found)
