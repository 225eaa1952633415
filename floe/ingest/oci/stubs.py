"""Stub layers: told apart from ordinary ones, and made. See floe/store/stub.py for the marker and the annotation."""

from __future__ import annotations

import io
import posixpath
import stat
import tarfile
from collections.abc import Callable, Mapping
from typing import TypeAlias

from floe.ingest.oci.gzipped import gzipped
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.places import parents_of
from floe.store.nodes import Node, find
from floe.store.stub import ANNOTATION, MARKER, Marker

RootOf: TypeAlias = Callable[[], Node]
EMPTY = Node(stat.S_IFDIR | 0o755)
_DEFAULT = Node(stat.S_IFDIR | 0o755)
_README = """The model {model} belongs here, at {path}, but is not.

It is mounted here, on demand, by nodes that run Floe's snapshotter for containerd. This node does not, or
this container was started with another snapshotter.

To have the model: start the container on a node with Floe, or put the model here yourself with
`floe model mount {model} {path}`.

Manifest: {manifest}
"""
_README_OF_IMAGE = """This image is the model {model}, but its files are not here.

They are mounted in its place, on demand, by nodes that run Floe's snapshotter for containerd. This node does not, or
the image is used with another snapshotter.

To have the model: use the image on a node with Floe, or get the files with `floe model export {model} DIR`.

Manifest: {manifest}
"""


def is_annotated(descriptor: Descriptor) -> bool:
    """Whether a manifest's layer says of itself that it stands for a model."""
    return ANNOTATION in descriptor.annotations


def has_marker(root: Node) -> bool:
    """Whether a layer holds the marker file: an attached image's stub whose annotation was lost in a rebuild."""
    node = find(root, MARKER.encode())
    return node is not None and node.is_file


def build_stub(marker: Marker, parents: Mapping[str, Node]) -> tuple[bytes, bytes]:
    """The stub layer's (tar, gzipped tar): marker, README, and the directories above with the image's own attributes.

    The same input gives the same bytes. On a node without Floe the layer hides what the image has at the model's path
    and shows the README there. A model at `/` is an image of its own.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for parent in parents_of(marker.path):
            _directory(tar, parent.strip("/"), parents.get(parent, _DEFAULT))
        place = marker.path.strip("/")
        if place:
            _directory(tar, place, _DEFAULT)
            _file(tar, f"{place}/.wh..wh..opq", b"")
        text = _README if place else _README_OF_IMAGE
        readme = text.format(model=marker.model, path=marker.path, manifest=marker.manifest)
        _file(tar, posixpath.join(place, "README"), readme.encode())
        _directory(tar, posixpath.dirname(MARKER), _DEFAULT)
        _file(tar, MARKER, marker.encode())
    data = buffer.getvalue()
    return data, gzipped(data)


def _directory(tar: tarfile.TarFile, name: str, node: Node) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, stat.S_IMODE(node.mode), node.uid, node.gid
    info.mtime = max(0, node.mtime)
    total = node.mtime * 10**9 + node.mtime_ns
    records: dict[str, str] = {}
    if node.mtime_ns or node.mtime < 0:
        sign = "-" if total < 0 else ""
        records["mtime"] = f"{sign}{abs(total) // 10**9}.{abs(total) % 10**9:09d}"
    for key, value in sorted(node.xattrs.items()):
        if not key.startswith(b"trusted."):
            text = key.decode("utf-8", "surrogateescape")
            records[f"SCHILY.xattr.{text}"] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = records
    tar.addfile(info)


def _file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.size = 0o444, len(content)
    tar.addfile(info, io.BytesIO(content))
