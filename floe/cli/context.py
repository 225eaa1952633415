"""Opens what most commands need, the store with its index, and closes it again."""

from __future__ import annotations

import errno
import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from floe.cli.settings import Settings
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, NoSpaceError, UnavailableError

_WHO = 255  # characters

if TYPE_CHECKING:
    from floe.store.cache import Cache
    from floe.store.catalog import Catalog
    from floe.store.vouching import Vouching


@contextmanager
def open_catalog(settings: Settings, *, trusting: bool = False, signing: bool = False) -> Iterator[Catalog]:
    """The catalog of the store in `settings`; store and index are closed afterwards.

    `trusting`: what it finds must be signed, where the settings have trusted keys. `signing`: what it publishes is signed,
    where they have a key to sign with, and says who did it; what it builds upon must be signed then, by a trusted key or this one.
    """
    vouching = vouching_of(settings, trusting=trusting, signing=signing)
    from floe.store.catalog import Catalog  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index import open_index  # noqa: PLC0415 - likewise
    from floe.store.objects import open_store  # noqa: PLC0415 - likewise
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - likewise

    inner = open_store(settings.store, retry=False)
    with (
        closing(RetryingStore(inner, deadline=settings.store_timeout)) as store,
        closing(open_index(settings.index)) as index,
    ):
        yield Catalog(store, index, vouching, by=whoami() if signing else "")


def whoami() -> str:
    """USER@HOST, for people; behind sudo the one who asked for it."""
    uid = os.geteuid()
    try:
        user = (not uid and os.environ.get("SUDO_USER")) or pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    text = f"{user}@{socket.gethostname()}"
    return text.encode("utf-8", "replace").decode()[:_WHO]


def vouching_of(settings: Settings, *, trusting: bool = False, signing: bool = False) -> Vouching | None:
    """The keys for `open_catalog`; None when there is nothing to ask for and nothing to sign with."""
    signs = signing and settings.signing_key is not None
    if not signs and not (trusting and settings.trusted_keys.sources):
        return None
    from floe.store.keyfiles import load_trust, read_signer  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.signing import Trust  # noqa: PLC0415 - likewise
    from floe.store.vouching import Vouching  # noqa: PLC0415 - likewise

    trust = load_trust(settings.trusted_keys.sources)
    if not signs or settings.signing_key is None:
        return Vouching(trust)
    signer = read_signer(settings.signing_key)
    return Vouching((trust or Trust(())).adding(signer.public), signer)


def check_patience(settings: Settings) -> None:
    """BadInputError when a deletion could be tried for so long that another collector takes over meanwhile."""
    from floe.upkeep.turn import LONGEST  # noqa: PLC0415 - lazy: keeps --help fast

    if settings.store_timeout > LONGEST:
        raise BadInputError(
            f"store_timeout is {settings.store_timeout:g} s; nothing can be removed safely with more than {LONGEST:g}",
            hint=f"give --store-timeout {LONGEST:g} or less",
        )


def open_cache(settings: Settings, *, required: bool = True) -> Cache:
    """The node cache, the size and reserve of each directory reckoned on the disk that holds it."""
    from floe.store.cache import open_cache as open_directories  # noqa: PLC0415 - lazy: keeps --help fast

    if required:
        make_cache_directories(
            settings
        )  # whose errors name the flag; else they are made, or left out, when they are opened
    return open_directories(
        settings.cache_roots,
        lambda total: (settings.cache_size.of(total), settings.cache_min_free.of(total)),
        required=required,
    )


def make_cache_directories(settings: Settings) -> None:
    """Of several, those that can be made: the others are left out when the cache is opened."""
    made, problem = 0, None
    for root, flag in zip(
        settings.cache_roots, ("--cache-dir", *("--cache-dirs",) * len(settings.cache_dirs)), strict=True
    ):
        try:
            make_directory(root, "cache directory", flag)
            made += 1
        except FloeError as error:
            problem = problem or error
    if problem is not None and not made:
        raise problem


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
