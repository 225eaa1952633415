"""All names of a store: the records below `refs/`, read again only where they changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from floe.store import layout
from floe.store.chunkfinder import each
from floe.store.errors import FloeError, NotFoundError
from floe.store.objects.base import ObjectStore
from floe.store.records import AttachmentRecord, ChainRecord, ImageRecord, Record, Ref

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used: the object at `key`, and why."""

    key: str
    error: FloeError


@dataclass
class Names:
    """Records by key, as they were at one time. `problems`: those that cannot be read."""

    models: dict[str, Ref] = field(default_factory=dict)
    images: dict[str, ImageRecord] = field(default_factory=dict)
    attachments: dict[str, AttachmentRecord] = field(default_factory=dict)
    layers: dict[str, Ref] = field(default_factory=dict)
    chains: dict[str, ChainRecord] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class NameReader:
    """Reads the names of `store`, at first all of them, then what is new. Raises the store's passing errors only.

    Takes a listing of `refs/`, and a request for each record that is not known in its version.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: dict[str, tuple[str, Record]] = {}  # key -> version, record

    def read(self) -> Names:
        """The names now. What names others comes first, as it is written last: so nothing is seen without what it names."""
        names = Names()
        names.models = self._below(layout.MODEL_REFS, Ref, names.problems)
        names.images = self._below(layout.IMAGE_REFS, ImageRecord, names.problems)
        names.attachments = self._below(layout.ATTACHMENT_REFS, AttachmentRecord, names.problems)
        names.chains = self._below(layout.CHAIN_REFS, ChainRecord, names.problems)
        names.layers = self._below(layout.LAYER_REFS, Ref, names.problems)
        read: dict[str, Record] = {**names.models, **names.images, **names.attachments, **names.chains, **names.layers}
        self._known = {key: known for key, known in self._known.items() if key in read}
        return names

    def _below(self, prefix: str, kind: type[R], problems: list[Problem]) -> dict[str, R]:
        versions = {info.key: info.version for info in self._store.list(prefix)}
        changed = [key for key, version in versions.items() if self._known.get(key, ("",))[0] != version]

        def read(key: str) -> tuple[str, R | FloeError | None]:
            try:
                data, version = self._store.get_versioned(key)
                record = kind.decode(data, key)
            except NotFoundError:  # removed since it was listed
                return key, None
            except FloeError as error:
                if error.retryable:
                    raise
                return key, error
            self._known[key] = (version, record)
            return key, record

        gone = set()
        for key, found in each(read, changed):
            if isinstance(found, FloeError):
                problems.append(Problem(key, found))
            if not isinstance(found, kind):
                gone.add(key)
        records = ((key, self._known[key][1]) for key in versions if key not in gone)
        return {key: record for key, record in records if isinstance(record, kind)}
