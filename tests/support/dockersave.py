"""Files of `docker save`, as Docker wrote them up to 24 (`legacy`) and writes them from 25 on (`current`).

Source: moby's image/tarexport/save.go of both, and what `docker save` of Docker 24 and 28 puts out.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from support.images import BuiltImage, oci_archive


def legacy(path: Path, images: Sequence[tuple[BuiltImage, Sequence[str] | None]]) -> Path:
    """Images with their tags, or None for one saved by its id: a folder for each layer; one saved before is a symlink."""
    listed = []
    first: dict[str, str] = {}  # the member of a layer's blob
    with tarfile.open(path, "w") as tar:
        for image, tags in images:
            names = []
            for number, layer in enumerate(image.layers):
                folder = hashlib.sha256(f"{image.config_digest}{number}".encode()).hexdigest()
                name = f"{folder}/layer.tar"
                _add(tar, f"{folder}/VERSION", b"1.0")
                if layer["digest"] in first:
                    link = tarfile.TarInfo(name)
                    link.type, link.linkname = tarfile.SYMTYPE, f"../{first[layer['digest']]}"
                    tar.addfile(link)
                else:
                    _add(tar, name, blob(image, layer["digest"]))
                    first[layer["digest"]] = name
                names.append(name)
            config = image.config_digest.removeprefix("sha256:") + ".json"
            _add(tar, config, blob(image, image.config_digest))
            listed.append({"Config": config, "RepoTags": tags, "Layers": names})
        _add(tar, "manifest.json", json.dumps(listed).encode())
    return path


def current(path: Path, image: BuiltImage, tags: Sequence[str] | None) -> Path:
    """One image: its OCI layout, and the same list as ever beside it."""
    oci_archive(image.directory, path)
    named = ["blobs/sha256/" + d["digest"].removeprefix("sha256:") for d in image.layers]
    config = "blobs/sha256/" + image.config_digest.removeprefix("sha256:")
    listed = [{"Config": config, "RepoTags": tags, "Layers": named, "LayerSources": {}}]
    with tarfile.open(path, "a") as tar:
        _add(tar, "manifest.json", json.dumps(listed).encode())
    return path


def blob(image: BuiltImage, digest: str) -> bytes:
    """A blob of the layout that `image` lies in."""
    return (image.directory / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
