"""Profiles in the store: of trees, and of sources, by which a tree that nobody started yet profits from its predecessors.

A *source* is what versions have in common: `models/NAME` for all tags of a model, wherever a tree places it, and
`images/REPOSITORY@PLATFORM#N` for layer N of a repository's images. Whoever publishes a tree says which source it belongs to
by an empty profile (`seed`); whoever reads the tree adds what was touched to both (`add`), by conditional puts.

The index has no part in it: a start asks it little enough as it is, and nobody waits for a profile. Everything in here can be
lost: starts are slower then, and nothing else.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import (
    ConflictError,
    DamagedError,
    FloeError,
    NotFoundError,
    UnsupportedError,
)
from floe.store.profile import Profile, is_news, merge

_log = logging.getLogger(__name__)

_ATTEMPTS = 20  # conditional puts lost in a row before giving up
_PAUSE = 0.2  # seconds, the longest before the second attempt; doubled up to 32 times that


class ProfileStore:
    """The profiles beside what `catalog` names. Thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def of_tree(self, tree: str) -> Profile | None:
        """The profile of a tree; None when there is none, or none that this Floe can read, which is logged.

        Raises the store's errors.
        """
        return self._load(layout.tree_profile_key(tree))

    def of_source(self, source: str) -> Profile | None:
        """The same for a source."""
        return self._load(layout.source_profile_key(source))

    def seed(self, tree: str, source: str, prefix: bytes = b"", *, of: str | None = None) -> None:
        """Say which source a tree just published belongs to, unless that was said; see Profile for `prefix`.

        `of`: a tree of the same files, laid out otherwise, whose starts, by path, count for this one too.
        A profile is no reason for a push to fail: what goes wrong is logged.
        """
        key = layout.tree_profile_key(tree)
        try:
            made = Profile(source=source, prefix=prefix)
            known = self.of_tree(of) if of not in (None, tree) else None
            if known is not None:
                made = replace(known, frames={})
            self._catalog.store.put_if(key, made.encode(), None)
        except ConflictError:
            pass
        except FloeError as error:
            _log.info("no start-up profile for tree %s: %s", tree, error)

    def add(self, tree: str, recorded: Profile) -> bool:
        """Add a recording to a tree's profile and to that of its source; whether anything had to be written.

        What is known already is not written again. A profile of a newer Floe stays as it is; a damaged one is replaced.
        Raises the store's errors: AccessDeniedError when this node may not write.
        """
        known, written = self._add(layout.tree_profile_key(tree), recorded)
        if known is not None and known.source:
            size = len(known.prefix)
            pieces = {
                (path[size:], piece): touch
                for (path, piece), touch in recorded.pieces.items()
                if path.startswith(known.prefix)
            }
            of_source = Profile(recorded.starts, known.source, pieces=pieces)
            written = self._add(layout.source_profile_key(known.source), of_source)[1] or written
        return written

    def clear(self, tree: str) -> bool:
        """Forget what was recorded of a tree and of its source; whether there was anything. Raises the store's errors."""
        key = layout.tree_profile_key(tree)
        found, version = self._get(key)
        source = found.source if found is not None else ""
        cleared = version is not None and (found is None or found.starts > 0)
        if cleared and source and found is not None:
            self._catalog.store.put_if(key, Profile(source=source, prefix=found.prefix).encode(), version)
        elif cleared:
            self._catalog.store.delete(key)
        if source:
            key = layout.source_profile_key(source)
            cleared = self._get(key)[1] is not None or cleared
            self._catalog.store.delete(key)
        return cleared

    # Shared by the above

    def _load(self, key: str) -> Profile | None:
        self._catalog.check_store()
        try:
            data = bytes(self._catalog.store.get(key))
            return Profile.decode(data, key)
        except NotFoundError:
            return None
        except (DamagedError, UnsupportedError) as error:
            _log.warning("%s; the start goes on without it", error)
            return None

    def _get(self, key: str) -> tuple[Profile | None, str | None]:
        """What is in the bucket and its version; (None, version) when it is damaged, (None, None) when not there."""
        try:
            data, version = self._catalog.store.get_versioned(key)
        except NotFoundError:
            return None, None
        try:
            return Profile.decode(data, key), version
        except DamagedError as error:
            _log.warning("%s", error)
            return None, version

    def _add(self, key: str, recorded: Profile) -> tuple[Profile | None, bool]:
        """What is at `key` now (None: what this Floe cannot read), and whether that was written here."""
        self._catalog.check_store()
        for attempt in range(_ATTEMPTS):
            try:
                known, version = self._get(key)
            except UnsupportedError as error:
                _log.info("%s; nothing is added to it", error)
                return None, False
            if known is not None and not is_news(known, recorded):
                return known, False
            merged = merge(known or Profile(), recorded)
            try:
                self._catalog.store.put_if(key, merged.encode(), version)
            except ConflictError:
                # Many nodes finish together: whoever lost looks again whether there is anything left to say.
                time.sleep(random.uniform(0, _PAUSE * 2 ** min(attempt, 5)))
                continue
            return merged, True
        raise ConflictError(
            f"{key} in {self._catalog.store.url} changes faster than it can be set", hint="nothing is lost"
        )


def model_source(name: str) -> str:
    """The source of all versions of a model; `name` without tag."""
    return f"models/{name}"


def layer_source(image: str, platform: str, number: int) -> str:
    """The source of layer `number` (0: the bottom) of all images of a repository; `image` with tag or digest, or without."""
    name = image.partition("@")[0]
    head, colon, tail = name.rpartition(":")
    repository = head if colon and "/" not in tail else name
    return f"images/{repository}@{platform}#{number}"
