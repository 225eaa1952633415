"""`floe://[ORG/]NAME:TAG/PATH` and `floe://[ORG/]NAME@DIGEST/PATH` for fsspec, and so for pandas, datasets and others.

Registered by the package's entry point. A model's address has its tag or digest, so that it cannot be mistaken for an org.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from fsspec.spec import AbstractFileSystem

from floe.client.store import Model, Store, open_store
from floe.client.tree import DIRECTORY, SYMLINK, Entry
from floe.fuse.errno_map import errno_of
from floe.store.errors import BadInputError, FloeError, NotFoundError

_MODELS = 64  # kept open, by name: each holds its tree mapped


class FloeFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Models of a store as a read-only file system. `store` and the other arguments are those of `floe.open_store`.

    The first use of a name decides what it stands for in this object. Errors are OSErrors, as fsspec's users expect.
    """

    protocol = "floe"
    root_marker = ""

    def __init__(self, store: str | None = None, *, config: str | None = None, **options: Any) -> None:
        ours = {
            "use_listings_cache",
            "listings_expiry_time",
            "max_paths",
            "skip_instance_cache",
            "asynchronous",
            "loop",
        }
        super().__init__(**{key: value for key, value in options.items() if key in ours})
        settings = {key: value for key, value in options.items() if key not in ours}
        with _os_errors("floe://"):
            self._store: Store = open_store(store, config=config, **settings)
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()  # guards _models

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's
        """What is at a path: models and orgs, or what is in a model. A symlink to a directory in it has the type "other"."""
        path = self._strip_protocol(path)
        name, inner = _split(path)
        with _os_errors(path):
            if name is None:
                found = self._names(path)
            else:
                model = self._model(name)
                entry = model.stat(inner)
                if entry.kind == DIRECTORY:
                    found = [
                        self._describe(model, f"{path}/{child.name}", child, listed=True) for child in model.ls(inner)
                    ]
                else:
                    found = [self._describe(model, path, entry)]
        return found if detail else sorted(item["name"] for item in found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size, type and times of what is at a path."""
        path = self._strip_protocol(path)
        name, inner = _split(path)
        with _os_errors(path):
            if name is None:
                if path:
                    self._names(path)
                return _directory(path)
            model = self._model(name)
            return self._describe(model, path, model.stat(inner))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> _Buffered:
        if mode != "rb":
            raise _read_only(f"open in mode {mode!r}", path)
        name, inner = _split(self._strip_protocol(path))
        with _os_errors(path):
            if name is None:
                raise IsADirectoryError(errno.EISDIR, "no file of a model; write floe://NAME:TAG/PATH", path)
            model = self._model(name)
            entry = model.stat(inner)
            if entry.kind == DIRECTORY:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            raw = _Raw(model.open(inner, buffering=0), path)
        return _Buffered(raw, min(max(block_size, 1 << 16), 16 << 20) if block_size else 1 << 20, entry.size)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Bytes [start, end) of a file; negative ones count from its end."""
        with self._open(path) as file:
            size = file.seek(0, os.SEEK_END)
            first, last, _step = slice(start, end).indices(size)
            file.seek(first)
            return file.read(max(0, last - first))

    def created(self, path: str) -> datetime:
        """When the version was made that a file is of."""
        model, _ = self._find(path)
        return datetime.fromisoformat(model.manifest.created.replace("Z", "+00:00"))

    def modified(self, path: str) -> datetime:
        """The file's own time."""
        _, entry = self._find(path)
        return datetime.fromtimestamp(entry.mtime_ns / 1e9, timezone.utc)

    def ukey(self, path: str) -> str:
        """Changes when the content may have: the version's digest and the path."""
        path = self._strip_protocol(path)
        name, inner = _split(path)
        if name is None:
            self.info(path)
            return path
        model, _ = self._find(path)
        return f"{model.digest}/{inner}"

    # fsspec's own do nothing, or fail without a word. The verbs that are left out here come to these, or to _open.

    def mkdir(self, path: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("make a directory", path)

    def makedirs(self, path: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("make a directory", path)

    def rmdir(self, path: str) -> None:
        """EROFS."""
        raise _read_only("remove", path)

    def rm(self, path: str | list[str], *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("remove", path)

    def rm_file(self, path: str) -> None:
        """EROFS."""
        raise _read_only("remove", path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """EROFS."""
        raise _read_only("copy", path1, path2)

    def copy(self, path1: str | list[str], path2: str | list[str], *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("copy", path1, path2)

    def mv(self, path1: str, path2: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("move", path1, path2)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("put", lpath, rpath)

    def put(self, lpath: str | list[str], rpath: str | list[str], *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("put", lpath, rpath)

    def pipe_file(self, path: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("write", path)

    def touch(self, path: str, *_: Any, **__: Any) -> None:
        """EROFS."""
        raise _read_only("touch", path)

    def _find(self, path: str) -> tuple[Model, Entry]:
        """The model that a path leads into, and what is there."""
        name, inner = _split(self._strip_protocol(path))
        if name is None:
            raise FileNotFoundError(errno.ENOENT, "no file of a model; write floe://NAME:TAG/PATH", path)
        with _os_errors(path):
            model = self._model(name)
            return model, model.stat(inner)

    def _model(self, name: str) -> Model:
        with self._lock:
            found = self._models.get(name)
        if found is None:
            found = self._store.model(name)
            with self._lock:
                while len(self._models) >= _MODELS:
                    self._models.pop(next(iter(self._models)))
                found = self._models.setdefault(name, found)
        return found

    def _names(self, org: str) -> list[dict[str, Any]]:
        """Orgs and models below `org`, "" for all. NotFoundError."""
        found = {}
        for info in self._store.models():
            whose = info.name.rpartition("/")[0]
            path = f"{info.name}:{info.tag}" if whose == org else whose
            if whose == org or (not org and whose):
                found[path] = _directory(path)
        if org and not found:
            raise NotFoundError(f"there is no model below {org!r}", hint="write floe://[ORG/]NAME:TAG/PATH")
        return list(found.values())

    @staticmethod
    def _describe(model: Model, path: str, entry: Entry, *, listed: bool = False) -> dict[str, Any]:
        if entry.kind == SYMLINK:
            link = {"name": path, "size": 0, "type": "other", "islink": True, "digest": model.digest}
            try:
                entry = model.stat(entry.path)
            except (NotFoundError, BadInputError):  # leads nowhere, or out of the model: what is beside it can be read
                return link
            # fsspec goes down into every directory that is listed, also where a link leads back up.
            if listed and entry.kind == DIRECTORY:
                return link
        if entry.kind == DIRECTORY:
            return {**_directory(path), "mtime": entry.mtime_ns / 1e9, "digest": model.digest}
        return {
            "name": path,
            "size": entry.size,
            "type": "file",
            "mode": entry.mode,
            "mtime": entry.mtime_ns / 1e9,
            "ino": entry.inode,
            "digest": model.digest,
        }


class _Buffered(io.BufferedReader):
    """A file with its `size` in bytes, which fsspec reads blocks by."""

    def __init__(self, raw: _Raw, buffer: int, size: int) -> None:
        super().__init__(raw, buffer)
        self.size = size


class _Raw(io.RawIOBase):
    """A file whose errors are OSErrors."""

    def __init__(self, file: Any, path: str) -> None:
        super().__init__()
        self._file, self._path = file, path
        self.mode = "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: object) -> int:
        with _os_errors(self._path):
            return int(self._file.readinto(buffer))


def _split(path: str) -> tuple[str | None, str]:
    """The model's name and the path in it; (None, ""): above the models."""
    parts = path.strip("/").split("/")
    for count in (1, 2):
        if len(parts) >= count and any(mark in parts[count - 1] for mark in ":@"):
            return "/".join(parts[:count]), "/".join(parts[count:])
    return None, ""


def _directory(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _read_only(what: str, path: str | list[str], other: str | list[str] | None = None) -> OSError:
    return OSError(errno.EROFS, f"cannot {what}: models are read-only (push another version)", path, None, other)


@contextmanager
def _os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FloeError as error:
        text = f"{error} ({error.hint})" if error.hint else str(error)
        number = errno.ENOENT if isinstance(error, NotFoundError) else errno_of(error)
        raise OSError(number, text, path) from error
