"""OCI images made on the spot: an image layout directory out of tar layers.

`build_oci(directory, layers)` writes `oci:DIRECTORY:TAG`; `oci_archive(directory)` is what `ctr image import` takes.
A layer is the bytes of a tar, or a callable that fills a TarFile; compression "gzip", "zstd" or "" for none.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import zstandard

Layer: TypeAlias = "bytes | Callable[[tarfile.TarFile], None]"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
ARCHITECTURE = ARCHITECTURES.get(platform.machine(), platform.machine())
BUSYBOX = Path(shutil.which("busybox") or "/bin/busybox")
APPLETS = ("cat", "date", "env", "find", "head", "id", "ls", "md5sum", "sh", "sleep", "stat", "tail", "touch", "true")
# The same bytes every time: layers have one date.
MTIME = 1_700_000_000


@dataclass(frozen=True)
class BuiltImage:
    """What was written. Digests are `sha256:<hex>`; `layers` are the blobs' descriptors as in the manifest."""

    directory: Path
    tag: str
    manifest_digest: str
    config_digest: str
    diff_ids: tuple[str, ...]
    layers: tuple[dict, ...] = field(default=())

    @property
    def source(self) -> str:
        """The image as skopeo and `floe image index` name it."""
        return f"oci:{self.directory}:{self.tag}"


def make_tar(layer: Layer) -> bytes:
    """A layer's uncompressed tar (PAX: xattrs, long names and nanoseconds survive)."""
    if not callable(layer):
        return bytes(layer)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        layer(tar)
    return buffer.getvalue()


def add(
    tar: tarfile.TarFile,
    name: str,
    content: bytes | None = b"",
    *,
    mode: int = 0o644,
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    uid: int = 0,
    gid: int = 0,
    mtime: float = MTIME,
    xattrs: Mapping[str, str] | None = None,
    device: tuple[int, int] = (0, 0),
) -> None:
    """Add one entry; directories by `kind=tarfile.DIRTYPE`, links by `kind` and `link`."""
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname, info.uid, info.gid, info.mtime = mode, kind, link, uid, gid, mtime
    info.devmajor, info.devminor = device
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    data = content or b""
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)


def files(content: Mapping[str, bytes | str]) -> Callable[[tarfile.TarFile], None]:
    """A layer of regular files and the directories above them."""

    def fill(tar: tarfile.TarFile) -> None:
        made: set[str] = set()
        for name, data in sorted(content.items()):
            for parent in reversed([str(path) for path in Path(name).parents if str(path) != "."]):
                if parent not in made:
                    made.add(parent)
                    add(tar, parent, mode=0o755, kind=tarfile.DIRTYPE)
            add(tar, name, data.encode() if isinstance(data, str) else data)

    return fill


def busybox(*, applets: Sequence[str] = APPLETS) -> Callable[[tarfile.TarFile], None]:
    """A base layer that runs: busybox and its applets in /bin, /etc/passwd, /tmp."""

    def fill(tar: tarfile.TarFile) -> None:
        for name in ("bin", "dev", "etc", "proc", "sys", "root"):
            add(tar, name, mode=0o755, kind=tarfile.DIRTYPE)
        add(tar, "tmp", mode=0o1777, kind=tarfile.DIRTYPE)
        add(tar, "bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
        for applet in applets:
            add(tar, f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox", mode=0o777)
        add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")

    return fill


def build_oci(
    directory: Path,
    layers: Sequence[Layer],
    *,
    tag: str = "latest",
    command: Sequence[str] = ("/bin/sh",),
    env: Sequence[str] = ("PATH=/bin",),
    compression: str = "gzip",
    annotations: Mapping[int, Mapping[str, str]] | None = None,
    architecture: str = ARCHITECTURE,
    config: Mapping[str, object] | None = None,
) -> BuiltImage:
    """Write an image into an OCI layout; one with another tag may already lie there.

    `annotations` maps a layer's number to its descriptor's annotations; `config` is merged into the image's config.
    """
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    diff_ids, descriptors = [], []
    for number, layer in enumerate(layers):
        tar = make_tar(layer)
        diff_ids.append(_digest(tar))
        descriptor = _blob(blobs, *_compress(tar, compression))
        if annotations and number in annotations:
            descriptor["annotations"] = dict(annotations[number])
        descriptors.append(descriptor)
    image_config = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": list(command), "Env": list(env)},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        **(config or {}),
    }
    config_descriptor = _blob(blobs, json.dumps(image_config).encode(), CONFIG)
    manifest = _blob(
        blobs,
        json.dumps(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": config_descriptor, "layers": descriptors}
        ).encode(),
        MANIFEST,
    )
    _add_to_index(directory / "index.json", manifest, tag, architecture)
    return BuiltImage(
        directory, tag, manifest["digest"], config_descriptor["digest"], tuple(diff_ids), tuple(descriptors)
    )


def oci_archive(directory: Path, archive: Path) -> Path:
    """The layout as one tar."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(directory.rglob("*")):
            tar.add(path, path.relative_to(directory).as_posix(), recursive=False)
    return archive


def _add_to_index(path: Path, manifest: dict, tag: str, architecture: str) -> None:
    index = json.loads(path.read_text()) if path.exists() else {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    named = "org.opencontainers.image.ref.name"
    kept = [entry for entry in index["manifests"] if entry.get("annotations", {}).get(named) != tag]
    platform_ = {"architecture": architecture, "os": "linux"}
    index["manifests"] = [*kept, {**manifest, "annotations": {named: tag}, "platform": platform_}]
    path.write_text(json.dumps(index))


def _compress(tar: bytes, compression: str) -> tuple[bytes, str]:
    if compression == "gzip":
        return gzip.compress(tar, 6, mtime=0), f"{LAYER}+gzip"
    if compression == "zstd":
        return zstandard.ZstdCompressor().compress(tar), f"{LAYER}+zstd"
    return tar, LAYER


def _blob(blobs: Path, data: bytes, media_type: str) -> dict:
    digest = _digest(data)
    (blobs / digest.partition(":")[2]).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
