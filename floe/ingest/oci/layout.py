"""Images in an OCI layout: a folder, or a tar file of one, read in place by the offsets of its members.

Source: OCI image-spec, image-layout.md. A layout may list several images; a tag is the annotation
`org.opencontainers.image.ref.name`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from floe.ingest.oci import media
from floe.ingest.oci.archive import PIECE, SMALL, Archive, path_errors
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.references import LayoutRef
from floe.ingest.oci.source import Source, verified
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError

TAG = "org.opencontainers.image.ref.name"
_VERSION = {"imageLayoutVersion": "1.0.0"}
_MARKER, _INDEX = "oci-layout", "index.json"


class _Files(Protocol):
    def read(self, name: str) -> bytes | None: ...
    def open(self, name: str) -> Iterator[bytes] | None: ...
    def close(self) -> None: ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str) -> bytes | None:
        with path_errors(self._path):
            try:
                with (self._path / name).open("rb") as file:
                    return file.read(SMALL)
            except FileNotFoundError:
                return None

    def open(self, name: str) -> Iterator[bytes] | None:
        with path_errors(self._path):
            path = self._path / name
            return self._pieces(path) if path.is_file() else None

    def _pieces(self, path: Path) -> Iterator[bytes]:
        with path_errors(path), path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece

    def close(self) -> None: ...


class LayoutSource:
    """The image `ref` of a layout, to read. Thread-safe."""

    def __init__(self, ref: LayoutRef) -> None:
        self.ref = ref
        self.name = str(ref)
        path = Path(ref.path)
        kind = "file" if ref.archive else "folder"
        if not path.exists():
            raise NotFoundError(f"there is no {kind} {path}", hint="check the path")
        if path.is_dir() == ref.archive:
            other = "oci:" if ref.archive else "oci-archive:"
            raise BadInputError(f"{path} is no {kind}", hint=f"did you mean {other}{path}?")
        self._files: _Files = _open_archive(path) if ref.archive else _Folder(path)
        try:
            self._check()
        except BaseException:
            self._files.close()
            raise

    def _check(self) -> None:
        raw = self._files.read(_MARKER)
        if raw is None:
            raise NotFoundError(
                f"{self.ref.path} is not an OCI layout: it has no file {_MARKER!r}", hint="check the path"
            )
        try:
            version = json.loads(raw)["imageLayoutVersion"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{self.ref.path} has a malformed file {_MARKER!r}") from error
        if not str(version).startswith("1."):
            raise UnsupportedError(f"{self.ref.path} is an OCI layout of version {version!r}; Floe reads 1.x")

    def close(self) -> None:
        """See Source.close."""
        self._files.close()

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest. Without a tag, a layout of one image, or of one per platform, stands for that."""
        if descriptor is None:
            raw = self._files.read(_INDEX)
            if raw is None:
                raise NotFoundError(f"{self.ref.path} is not an OCI layout: it has no {_INDEX}", hint="check the path")
            index = media.parse_manifest(raw, media.OCI_INDEX, f"{_INDEX} of {self.ref.path}")
            if not isinstance(index, media.ImageIndex):
                raise DamagedError(f"{_INDEX} of {self.ref.path} is no index")
            descriptor = self._choose(index.manifests)
            if descriptor is None:
                return raw, media.OCI_INDEX
        media.check_size(descriptor, media.MAX_MANIFEST, f"manifest {descriptor.digest} of {self.name}")
        return b"".join(self.open_blob(descriptor)), descriptor.media_type

    def _choose(self, manifests: tuple[Descriptor, ...]) -> Descriptor | None:
        """The entry asked for; None when the whole index is meant."""
        tag, digest = self.ref.tag, self.ref.digest
        if digest:
            listed = [m for m in manifests if m.digest == digest]
            if listed or (found := self._files.open(blob_name(digest))) is None:
                return _only(listed[:1], f"manifest {digest}", self.ref.path, manifests)
            size = sum(map(len, found))
            return Descriptor("", digest, size)
        if tag is not None:
            return _only(
                [m for m in manifests if m.annotations.get(TAG) == tag], f"tag {tag!r}", self.ref.path, manifests
            )
        platforms = [str(Platform.of(m.platform)) for m in manifests if m.platform]
        if (
            len(manifests) > 1
            and len(set(platforms)) == len(manifests)
            and not any(TAG in m.annotations for m in manifests)
        ):
            return None
        if len(manifests) > 1:
            raise BadInputError(
                f"{self.ref.path} holds {len(manifests)} images: {_tags(manifests)}", hint="give one: oci:DIR:TAG"
            )
        return _only(list(manifests), "image", self.ref.path, manifests)

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        pieces = self._files.open(blob_name(descriptor.digest))
        if pieces is None:
            raise NotFoundError(f"{self.ref.path} does not hold blob {descriptor.digest}", hint="copy the image again")
        return verified(pieces, descriptor, self.name)


class LayoutTarget:
    """The tag `ref` of a layout folder, to write; the folder is made when it is not there."""

    def __init__(self, ref: LayoutRef) -> None:
        self.ref = ref
        self.name = str(ref)
        if ref.digest:
            raise BadInputError(f"cannot write to {self.name}: a digest is no name", hint="give a tag: oci:DIR:TAG")
        self._path = Path(ref.path)
        if self._path.exists() and not (self._path / _MARKER).exists() and any(self._path.iterdir()):
            raise BadInputError(f"{self._path} is neither empty nor an OCI layout", hint="give another folder")
        self._others(self._read_index())  # refused before anything is written

    def close(self) -> None:
        """See Target.close."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """See Target.has_blob. A file of that name is believed only after it was read: a damaged one is replaced."""
        pieces = _Folder(self._path).open(blob_name(descriptor.digest))
        try:
            return pieces is not None and _read(verified(pieces, descriptor, self.name))
        except DamagedError:
            return False

    def mount_blob(self, descriptor: Descriptor, source: Source) -> bool:
        """See Target.mount_blob: links the file of another layout on the same disk, once it was read and found sound."""
        if not isinstance(source, LayoutSource) or source.ref.archive:
            return False
        origin, here = Path(source.ref.path) / blob_name(descriptor.digest), self._path / blob_name(descriptor.digest)
        with path_errors(self._path):
            here.parent.mkdir(parents=True, exist_ok=True)
        try:
            here.hardlink_to(origin)
        except OSError:
            return False
        try:
            # What was linked is what must be read, not what has the other name by now.
            return _read(
                verified(_Folder(self._path).open(blob_name(descriptor.digest)) or (), descriptor, source.name)
            )
        except BaseException:
            here.unlink(missing_ok=True)
            raise

    def push_blob(self, descriptor: Descriptor, opened: Callable[[], Iterable[bytes]]) -> None:
        """See Target.push_blob."""
        self._write(blob_name(descriptor.digest), verified(opened(), descriptor, self.name))

    def put_manifest(self, raw: bytes, media_type: str, *, named: bool = True) -> None:
        """See Target.put_manifest: replaces the entry of the same tag, or the only one without a tag."""
        entry: dict[str, Any] = {"mediaType": media_type, "digest": media.sha256_digest(raw), "size": len(raw)}
        if self.ref.tag is not None:
            entry["annotations"] = {TAG: self.ref.tag}
        self._write(blob_name(entry["digest"]), [raw])
        if not named:
            return
        with self._locked():
            index = self._read_index()
            index["manifests"] = [*self._others(index), entry]
            self._write(_MARKER, [json.dumps(_VERSION).encode()])
            self._write(_INDEX, [json.dumps(index).encode()])

    def _others(self, index: dict[str, Any]) -> list[dict[str, Any]]:
        """The entries that stay. BadInputError when nobody can tell which one is to be replaced."""
        entries: list[dict[str, Any]] = index["manifests"]
        others = [entry for entry in entries if (entry.get("annotations") or {}).get(TAG) != self.ref.tag]
        if self.ref.tag is None and len(entries) - len(others) > 1:
            raise BadInputError(
                f"{self._path} holds {len(entries) - len(others)} images without a tag", hint="give a tag: oci:DIR:TAG"
            )
        return others

    def _read_index(self) -> dict[str, Any]:
        empty = {"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": []}
        try:
            raw = _Folder(self._path).read(_INDEX)
            if raw is None:
                return empty
            index = json.loads(raw)
        except ValueError as error:
            raise DamagedError(f"{self._path / _INDEX} is not JSON") from error
        manifests = index.get("manifests") if isinstance(index, dict) else None
        if not isinstance(manifests, list) or not all(map(_is_entry, manifests)):
            raise DamagedError(f"{self._path / _INDEX} is no index")
        return dict(index)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two writers of one folder take turns at its index."""
        with path_errors(self._path):
            descriptor = os.open(self._path / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, name: str, pieces: Iterable[bytes]) -> None:
        path = self._path / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with path_errors(self._path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.writelines(pieces)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


def _open_archive(path: Path) -> Archive:
    archive = Archive(path)
    if _INDEX not in archive and "manifest.json" in archive:
        archive.close()
        raise UnsupportedError(
            f"{path} is an archive of an older `docker save`, not an OCI archive",
            hint=f"read it as docker-archive:{path}",
        )
    return archive


def blob_name(digest: str) -> str:
    """Where a layout keeps the blob `digest`."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _read(pieces: Iterable[bytes]) -> bool:
    """Read to the end, where a digest is checked."""
    for _ in pieces:
        pass
    return True


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("annotations") or {}, dict)


def _only(found: list[Descriptor], what: str, path: str, manifests: tuple[Descriptor, ...]) -> Descriptor:
    if len(found) == 1:
        return found[0]
    if found:
        raise DamagedError(f"{path} has {len(found)} images with {what}")
    raise NotFoundError(f"{path} has no {what}", hint=f"it has: {_tags(manifests)}")


def _tags(manifests: tuple[Descriptor, ...]) -> str:
    return ", ".join(m.annotations.get(TAG) or m.digest for m in manifests) or "nothing"
