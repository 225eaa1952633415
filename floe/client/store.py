"""A store and its models, for Python programs: what `floe.open_store` gives."""

from __future__ import annotations

import io
import mmap
import os
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from floe.cli import model_mount
from floe.cli.context import make_spool, open_cache, open_catalog
from floe.cli.names import parse_label, parse_model, parse_tagged
from floe.cli.settings import Settings, defaults_for
from floe.cli.settings import load as load_settings
from floe.cli.umount import unmount
from floe.client.export import Exported, export_tree
from floe.client.files import BUFFER, ModelFile
from floe.client.packs import own_reader, served_reader
from floe.client.tree import DIRECTORY, Entry, TreePaths
from floe.store.catalog import Catalog
from floe.store.erofs_inodes import Inodes
from floe.store.errors import BadInputError
from floe.store.ids import ModelRef
from floe.store.progress import Progress
from floe.store.records import Manifest
from floe.store.trees import LocalTree, TreeStore

if TYPE_CHECKING:
    from floe.client.safetensors import Framework, SafeTensors
    from floe.fuse.reader import Reader

_DEADLINE = 60.0  # seconds for a tree and its packs' indexes


@dataclass(frozen=True)
class ModelInfo:
    """A tag, and what it names: `digest` of its manifest, sizes in bytes; `updated` and `created` are RFC 3339, UTC."""

    name: str
    tag: str
    digest: str
    files: int
    content_bytes: int
    stored_bytes: int
    created: str
    updated: str
    labels: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


class Mounted:
    """A model mounted at `path`. Unmounts when a `with` block ends, or by `unmount`; else it stays after the program."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self._settings, self.path = settings, path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.unmount()

    def unmount(self) -> None:
        """Unmount it. BusyError while files of it are open."""
        unmount(self._settings, self.path)


class Store:
    """A store of models; see `open_store`. Thread-safe. Close it, or use it in a `with` block.

    After a fork the child's models read on; it has all else, too, unless its parent had used a bucket: then what asks one
    is an UnsupportedError. Pickled, it is opened anew elsewhere, with the same settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()  # guards what follows, also while a reader is opened
        self._stack = ExitStack()
        self._opened: Catalog | None = self._stack.enter_context(open_catalog(settings, trusting=True))
        self._reader: Reader | None = None
        self._closed = False
        self._url = self._opened.store.url
        _stores.add(self)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<floe store {self._url}>"

    def __reduce__(self) -> tuple[object, ...]:
        self.check_open()
        return _unpickled_store, (self.settings,)

    def close(self) -> None:
        """Give up connections and the cache. Models and files of it cannot be read afterwards."""
        with self._lock:
            self._closed = True
            if self._reader is not None:
                self._reader.close()
                self._reader = None
            self._stack.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def check_open(self) -> None:
        """BadInputError when it was closed. For this package."""
        if self._closed:
            raise BadInputError("the store is closed", hint="read inside the with block, or open the store again")

    def leave_to_parent(self) -> None:
        """In a forked child: what is open is the parent's, and its threads stayed there. For this package."""
        _inherited.extend((self._reader, self._stack))
        self._lock, self._stack = threading.Lock(), ExitStack()
        self._reader = self._opened = None

    @property
    def _catalog(self) -> Catalog:
        self.check_open()
        if (opened := self._opened) is not None:
            return opened  # without the lock: nobody waits here for a reader that is opened
        with self._lock:
            self.check_open()
            if self._opened is None:
                self._opened = self._stack.enter_context(open_catalog(self.settings, trusting=True))
            return self._opened

    def models(self) -> list[ModelInfo]:
        """All tags of all models, in order. DamagedError, NotFoundError: the manifest of one cannot be read."""
        return [
            _info(ref, found.manifest, found.updated, self._catalog.get_manifest(found.manifest))
            for ref, found in self._catalog.models()
        ]

    def model(self, name: str) -> Model:
        """The model NAME[:TAG] or NAME@DIGEST, as its name stands now: it stays the same when the tag moves later.

        Fetches the tree, no content. NotFoundError: no such model. UntrustedError: trusted keys are set and none signed it.
        """
        ref, _ = parse_model(name)
        return self.version(ref, ref)

    def version(self, ref: ModelRef, wanted: ModelRef) -> Model:
        """The model `wanted`, called `ref`. For this package."""
        catalog = self._catalog
        digest, manifest = catalog.resolve_model(wanted)
        tree = TreeStore(catalog.store, open_cache(self.settings)).fetch(manifest.tree.digest, _DEADLINE)
        return Model(self, ref, digest, manifest, tree)

    def push(
        self,
        directory: str | os.PathLike[str],
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> ModelInfo:
        """Store a directory as NAME[:TAG]. BadInputError, NotFoundError: the directory; ConflictError: moved meanwhile."""
        from floe.ingest.model import push_model  # noqa: PLC0415 - only writers need it

        self.check_open()
        ref, own = parse_tagged(name)
        given = dict(parse_label(f"{key}={value}") for key, value in (labels or {}).items())
        make_spool(self.settings)
        with open_catalog(self.settings, signing=True) as catalog:
            result = push_model(
                catalog,
                Path(directory),
                ref,
                spool_dir=self.settings.spool,
                labels={**given, **own},
                workers=self.settings.workers,
                progress=progress,
            )
            return _info(ref, result.digest, catalog.model_ref(ref).updated, result.manifest)

    def reader(self) -> Reader:
        """Who reads packs through the cache in this process. For this package."""
        with self._lock:
            self.check_open()
            if self._reader is None:
                self._reader = own_reader(self.settings)
            return self._reader

    def mount(self, name: str, path: str | os.PathLike[str]) -> Mounted:
        """Mount a model at an empty or new directory: as root like `floe model mount`, else with `--portable`.

        UnsupportedError, UnavailableError, BusyError: it cannot be mounted here, or something is.
        """
        settings = self.settings if os.geteuid() == 0 else replace(self.settings, mounter="portable")
        ref, _ = parse_model(name)
        place = Path(path).absolute()
        model_mount.mount(settings, self._catalog, ref, place)
        return Mounted(settings, place)


class Model:
    """One version of a model, read from the store as it is needed, without a mount. Thread-safe.

    Pickled, it is the same version elsewhere, of a store with the same settings, which stays open as long as the process.
    """

    def __init__(self, store: Store, ref: ModelRef, digest: str, manifest: Manifest, tree: LocalTree) -> None:
        self.ref = ref
        self.digest = digest
        self.manifest = manifest
        self.labels: Mapping[str, str] = dict(manifest.labels)
        self._store, self._local = store, tree
        with tree.image.open("rb") as file:
            image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._tree = TreePaths(Inodes(memoryview(image), f"tree {tree.digest}"), str(ref))

    def __repr__(self) -> str:
        return f"<floe model {self.ref} {self.digest[:12]}>"

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickled_model, (self._store, self.ref, self.digest)

    def _open_served(self, packs: Collection[str] | None = None) -> Reader | None:
        self._store.check_open()
        return served_reader(self._store.settings, self._local, packs)

    def ls(self, path: str = "") -> list[Entry]:
        """What is in a directory of the model. NotFoundError."""
        return self._tree.ls(path)

    def walk(self) -> Iterator[Entry]:
        """Everything in the model, by path."""
        return self._tree.walk()

    def stat(self, path: str) -> Entry:
        """What is at a path, symlinks followed. NotFoundError."""
        return self._tree.find(path)

    @overload
    def open(self, path: str, *, buffering: Literal[0]) -> ModelFile: ...

    @overload
    def open(self, path: str) -> io.BufferedReader: ...

    @overload
    def open(self, path: str, *, buffering: int) -> io.BufferedReader | ModelFile: ...

    def open(self, path: str, *, buffering: int = BUFFER) -> io.BufferedReader | ModelFile:
        """A file for reading bytes; `buffering`: bytes read at once for small reads, 0 for none. NotFoundError.

        BadInputError for a directory.
        """
        entry = self._tree.find(path)
        if entry.kind == DIRECTORY:
            raise BadInputError(f"{path!r} in {self.ref} is a directory")
        file = ModelFile(self._tree, entry, self._open_served, self._store.reader, self._store.check_open)
        return io.BufferedReader(file, buffering) if buffering else file

    def read(self, path: str) -> bytes:
        """A whole file."""
        with self.open(path, buffering=0) as file:
            return file.read()

    def safetensors(self, path: str) -> SafeTensors:
        """The tensors of a .safetensors file, read one at a time, each straight into its memory."""
        from floe.client.safetensors import SafeTensors  # noqa: PLC0415 - only who reads tensors needs it

        return SafeTensors(self.open(path, buffering=0), f"{path} of {self.ref}")

    def tensors(self, framework: Framework = "numpy") -> Iterator[tuple[str, Any]]:
        """Names and tensors of all .safetensors files, in the order in which they are stored, one after another."""
        for entry in self._tree.walk():
            if entry.name.endswith(".safetensors") and self._tree.find(entry.path).kind != DIRECTORY:
                with self.safetensors(entry.path) as file:
                    yield from file.items(framework)

    def export(self, directory: str | os.PathLike[str], *, progress: Progress | None = None) -> Exported:
        """Write the model to a new or empty directory, whole or not at all; see floe/client/export.py."""
        workers = self._store.settings.workers
        served = self._open_served()
        try:
            reader = served or self._store.reader()
            return export_tree(self._tree, reader, Path(directory), workers=workers, progress=progress)
        finally:
            if served is not None:
                served.close()


def open_store(url: str | None = None, *, config: str | None = None, **settings: object) -> Store:
    """The store at `url`; without one, the one that `floe` uses: FLOE_STORE, the settings file, the built-in default.

    `settings` are those of docs/OPERATIONS.md, by key (`cache_dir="/data/cache"`), lists and tables as a settings file has
    them; None leaves one as it is. `config` is a settings file, "" for none. Nothing is fetched yet. BadInputError: a
    setting that is not known, or wrong.
    """
    flags = {key: _plain(value) for key, value in settings.items()}
    unknown = sorted(set(flags) - {*Settings.__dataclass_fields__})
    if unknown:
        raise BadInputError(f"there is no setting {unknown[0]!r}", hint="docs/OPERATIONS.md lists them")
    if url is not None:
        flags["store"] = url
    return Store(load_settings(flags, os.environ, config, defaults_for(os.geteuid(), os.environ)))


def _plain(value: object) -> object:
    """A setting as a file would give it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, int) else str(value)


_stores: weakref.WeakSet[Store] = weakref.WeakSet()  # all of them, to be told of a fork
# What a parent's threads may have been at work with when it forked; kept, since nothing of it can be closed here.
_inherited: list[object] = []
_unpickled: dict[Settings, Store] = {}  # one of each, since nobody closes them


def _leave_to_parent() -> None:
    for store in list(_stores):
        store.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def _unpickled_store(settings: Settings) -> Store:
    found = _unpickled.get(settings)
    if found is None or found.closed:
        found = _unpickled[settings] = Store(settings)
    return found


def _unpickled_model(store: Store, ref: ModelRef, digest: str) -> Model:
    return store.version(ref, ModelRef(ref.name, None, digest))


def _info(ref: ModelRef, digest: str, updated: str, manifest: Manifest) -> ModelInfo:
    stored = sum(pack.stored_size for pack in manifest.packs)
    return ModelInfo(
        ref.name,
        ref.tag or "",
        digest,
        manifest.sizes.files,
        manifest.sizes.content,
        stored,
        manifest.created,
        updated,
        dict(manifest.labels),
    )
