"""Opens what most commands need, the store with its index, and closes it again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from floe.cli.settings import Settings
from floe.store.errors import AccessDeniedError, NoSpaceError, UnavailableError

if TYPE_CHECKING:
    from floe.store.cache import NodeCache
    from floe.store.catalog import Catalog


@contextmanager
def open_catalog(settings: Settings) -> Iterator[Catalog]:
    """The catalog of the store in `settings`; store and index are closed afterwards."""
    from floe.store.catalog import Catalog  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index import open_index  # noqa: PLC0415 - likewise
    from floe.store.objects import open_store  # noqa: PLC0415 - likewise
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - likewise

    inner = open_store(settings.store, retry=False)
    with (
        closing(RetryingStore(inner, deadline=settings.store_timeout)) as store,
        closing(open_index(settings.index)) as index,
    ):
        yield Catalog(store, index)


def open_cache(settings: Settings) -> NodeCache:
    """The node cache, its size and reserve reckoned on the disk that holds it."""
    from floe.store.cache import NodeCache  # noqa: PLC0415 - lazy: keeps --help fast

    make_directory(settings.cache_dir, "cache directory", "--cache-dir")
    disk = os.statvfs(settings.cache_dir)
    total = disk.f_blocks * disk.f_frsize
    return NodeCache(settings.cache_dir, size=settings.cache_size.of(total), min_free=settings.cache_min_free.of(total))


def make_spool(settings: Settings) -> None:
    """The directory where packs wait for upload."""
    make_directory(settings.spool.parent, "spool directory", "--spool-dir")
    make_directory(settings.spool, "spool directory", "--spool-dir")


def make_directory(path: Path, what: str, flag: str, mode: int = 0o700) -> None:
    """Create `path`; the error says `what` it is and which `flag` names another."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except PermissionError as error:
        raise AccessDeniedError(f"cannot create the {what} {path}", hint=f"run as root, or give {flag}") from error
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UnavailableError
        raise kind(f"cannot create the {what} {path}: {error.strerror}", hint=f"give another {flag}") from error
