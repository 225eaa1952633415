"""The layer of a Bento's own files, and of what BentoML wants to find beside its models. The same Bento gives the same bytes.

Files belong to BentoML's user, as its Dockerfile has it, with the modes that they have there when the Bento was built under the common
umask of 022. Directories above the models have one time in every image: trees that place a model below them are then the same ones, and
nodes share them.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from floe.ingest.bento.find import HUB_MODELS, MODELS
from floe.ingest.chunker import changed, os_failure, shown
from floe.ingest.directory import plain_mode
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.derived import NewLayer
from floe.ingest.oci.gzipped import GzipWriter, file_pieces
from floe.ingest.oci.layers import OPAQUE_MARKER, WHITEOUT_PREFIX
from floe.ingest.oci.media import Descriptor
from floe.store.errors import BadInputError, UnavailableError
from floe.store.nodes import Node

OWNER = 1034  # BentoML's user and group: bentoml/_internal/container/generate.py, BENTO_UID_GID
ENTRYPOINT = "env/docker/entrypoint.sh"
_OPAQUE = OPAQUE_MARKER.decode()
_TIME = 0  # of directories above models
_LEFT_OUT = frozenset({MODELS, HUB_MODELS})


@dataclass(frozen=True)
class FilesLayer:
    """What goes into the layer.

    `root`: the Bento's absolute path in the image. `above`: what the image has at the directories on the way to it, by their
    paths. `latest`: place below `root` -> content. `models`: the models' own places below `root`.
    """

    root: str
    above: Mapping[str, Node]
    latest: Mapping[str, str]
    models: tuple[str, ...]
    mtime: int  # of the Bento's files, in seconds


def check_files(bento: Path) -> None:
    """BadInputError: the Bento in this folder has a file that no layer can hold. AccessDeniedError."""
    try:
        for _ in _walk(bento):
            pass
    except OSError as error:
        raise os_failure(error, os.fsencode(error.filename or bento)) from error


def write_layer(layer: FilesLayer, bento: Path | None, path: Path, media_type: str, created_by: str) -> NewLayer:
    """Write the layer to the file `path`, gzipped; `bento` is the folder with the Bento's files, None for an image that has them.

    What the image has in the Bento's directory is hidden when its files come: they may be an older Bento's. BadInputError: a file of the
    Bento that no layer can hold. SourceChangedError, AccessDeniedError.
    """
    try:
        with path.open("xb") as file:
            out = GzipWriter(file)
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
                _directories(tar, layer)
                if bento is not None:
                    _files(tar, layer, bento)
            out.finish()
            file.flush()
    except OSError as error:
        name = os.fsencode(error.filename or path)
        if error.filename is None or Path(os.fsdecode(error.filename)) == path:
            raise UnavailableError(
                f"{path} cannot be written: {error.strerror}", hint="give another --spool-dir"
            ) from error
        raise os_failure(error, name) from error
    descriptor = Descriptor(media_type, out.digest, out.size)
    return NewLayer(
        descriptor, out.diff_id, created_by, lambda: file_pieces(path), lambda: decompress(file_pieces(path), str(path))
    )


def _directories(tar: tarfile.TarFile, layer: FilesLayer) -> None:
    """The way to the models, each with an entry, and the two folders that BentoML has in every image, holding nothing of the image's."""
    parts = [part for part in layer.root.split("/") if part]
    for depth in range(1, len(parts) + 1):
        place = "/".join(parts[:depth])
        known = layer.above.get(f"/{place}")
        own = depth > 1  # /home is root's, /home/bentoml and what is in it BentoML's
        node = known or Node(stat.S_IFDIR | 0o755, OWNER if own else 0, OWNER if own else 0)
        _directory(tar, place, node)
    root = "/".join(parts)
    folders = {MODELS, HUB_MODELS}
    for place in (*layer.models, *layer.latest):
        above = place.split("/")[:-1]
        folders.update("/".join(above[:depth]) for depth in range(1, len(above) + 1))
    for folder in sorted(folders):
        _directory(tar, f"{root}/{folder}", Node(stat.S_IFDIR | 0o755, OWNER, OWNER))
        if "/" not in folder:
            _entry(tar, f"{root}/{folder}/{_OPAQUE}", tarfile.REGTYPE, 0o444, _TIME)
    for place, content in sorted(layer.latest.items()):
        data = content.encode()
        _entry(tar, f"{root}/{place}", tarfile.REGTYPE, 0o644, layer.mtime, data=io.BytesIO(data), size=len(data))


def _files(tar: tarfile.TarFile, layer: FilesLayer, bento: Path) -> None:
    root = layer.root.strip("/")
    _entry(tar, f"{root}/{_OPAQUE}", tarfile.REGTYPE, 0o444, _TIME)
    for path, found in _walk(bento):
        place = path.relative_to(bento).as_posix()
        name, mode = f"{root}/{place}", stat.S_IMODE(plain_mode(found.st_mode))
        if stat.S_ISDIR(found.st_mode):
            _entry(tar, name, tarfile.DIRTYPE, mode, layer.mtime)
        elif stat.S_ISLNK(found.st_mode):
            _entry(tar, name, tarfile.SYMTYPE, 0o777, layer.mtime, link=str(path.readlink()))
        else:
            mode = 0o755 if place == ENTRYPOINT else mode
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                source = _Whole(file, size, path)
                _entry(tar, name, tarfile.REGTYPE, mode, layer.mtime, data=source, size=size)


class _Whole(io.RawIOBase):
    """The first `size` bytes of a file. SourceChangedError when it has less by now."""

    def __init__(self, file: io.BufferedReader, size: int, path: Path) -> None:
        super().__init__()
        self._file, self._left, self._path = file, size, path

    def read(self, size: int = -1, /) -> bytes:
        """As much as is asked for, until the end."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._file.read(wanted)
        self._left -= len(data)
        if len(data) < wanted:
            raise changed(os.fsencode(self._path))
        return data


def _walk(bento: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All below the Bento but its models, each directory before what is in it. BadInputError: see check_files."""
    pending = [bento]
    while pending:
        here = pending.pop()
        below = []
        for path in sorted(here.iterdir()):
            if here == bento and path.name in _LEFT_OUT:
                continue
            if os.fsencode(path.name).startswith(WHITEOUT_PREFIX):
                raise BadInputError(
                    f"{shown(os.fsencode(path))} would stand for a removed file in a layer", hint="give it another name"
                )
            found = path.lstat()
            if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
                raise BadInputError(
                    f"{shown(os.fsencode(path))} is no file, directory or symlink", hint="remove it from the Bento"
                )
            yield path, found
            if stat.S_ISDIR(found.st_mode):
                below.append(path)
        pending.extend(reversed(below))


def _directory(tar: tarfile.TarFile, name: str, node: Node) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = (
        tarfile.DIRTYPE,
        stat.S_IMODE(node.mode),
        node.uid,
        node.gid,
        _TIME,
    )
    info.pax_headers = {
        f"SCHILY.xattr.{key.decode('utf-8', 'surrogateescape')}": value.decode("utf-8", "surrogateescape")
        for key, value in sorted(node.xattrs.items())
        if not key.startswith(b"trusted.")
    }
    tar.addfile(info)


def _entry(
    tar: tarfile.TarFile,
    name: str,
    kind: bytes,
    mode: int,
    mtime: int,
    *,
    link: str = "",
    data: io.BufferedIOBase | io.RawIOBase | None = None,
    size: int = 0,
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, OWNER, OWNER, mtime
    info.linkname, info.size = link, size
    tar.addfile(info, data)
