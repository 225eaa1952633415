"""What a user types to name an image. Pure: nothing is looked up here.

A registry reference is read as Docker reads it (distribution/reference): `python:3.12` is
`docker.io/library/python:3.12`. `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` and `docker-archive:FILE[:NAME:TAG]` name
images on disk, as in containers-transports(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TypeAlias

from floe.store.errors import BadInputError
from floe.store.ids import check_oci_digest

DOCKER_HUB = "docker.io"
_HUB_ALIASES = ("index.docker.io", "registry-1.docker.io")
_LAYOUT, _ARCHIVE, _DOCKER = "oci:", "oci-archive:", "docker-archive:"
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NAME_MAX = 255
_FORMS = (
    "use [HOST[:PORT]/]NAME[:TAG][@sha256:...], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME:TAG]"
)


@dataclass(frozen=True)
class RegistryRef:
    """An image in a registry: `host` (`docker.io`, `127.0.0.1:5000`), `repository`, `tag` and/or `digest`."""

    host: str
    repository: str
    tag: str | None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def reference(self) -> str:
        """What the manifest is asked for by: the digest when there is one, else the tag."""
        return self.digest or self.tag or "latest"


@dataclass(frozen=True)
class LayoutRef:
    """An image in an OCI layout: a folder, or with `archive` a tar file of one. At most one of tag and digest is set."""

    path: str
    tag: str | None = None
    digest: str | None = None
    archive: bool = False

    def __str__(self) -> str:
        end = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"{_ARCHIVE if self.archive else _LAYOUT}{os.path.abspath(self.path)}{end}"  # noqa: PTH100 - no I/O, unlike resolve


@dataclass(frozen=True)
class DockerArchiveRef:
    """An image in a file of `docker save`: by its full name, or by its `number` (from 0) in the file, or the only one."""

    path: str
    image: RegistryRef | None = None
    number: int | None = None

    def __str__(self) -> str:
        end = f":{self.image}" if self.image else f":@{self.number}" if self.number is not None else ""
        return f"{_DOCKER}{os.path.abspath(self.path)}{end}"  # noqa: PTH100 - no I/O, unlike resolve


ImageRef: TypeAlias = "RegistryRef | LayoutRef | DockerArchiveRef"


def parse_image_ref(text: str) -> ImageRef:
    """Parse what a user typed; BadInputError says which part is wrong and what is allowed."""
    if text.startswith(_ARCHIVE):
        return _layout(text, text[len(_ARCHIVE) :], archive=True)
    if text.startswith(_LAYOUT):
        return _layout(text, text[len(_LAYOUT) :], archive=False)
    if text.startswith(_DOCKER):
        return _docker_archive(text, text[len(_DOCKER) :])
    if "://" in text:
        raise BadInputError(f"image {text!r} has a scheme", hint=_FORMS)
    return parse_registry_ref(text)


def parse_registry_ref(text: str) -> RegistryRef:
    """Parse `[HOST[:PORT]/]NAME[:TAG][@DIGEST]` with Docker's defaults: docker.io, library/, latest."""
    rest, at, digest = text.partition("@")
    if at:
        check_oci_digest(digest, f"the digest in image {text!r}")
    head, slash, tail = rest.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost" or head != head.lower()):
        host, name = head, tail
    else:
        host, name = DOCKER_HUB, rest
    last = name.rpartition("/")[2]
    tag: str | None = None
    if ":" in last:
        name, _, tag = name.rpartition(":")
        if _TAG.fullmatch(tag) is None:
            raise BadInputError(f"tag {tag!r} in image {text!r} is not valid", hint=_FORMS)
    elif not at:
        tag = "latest"
    if host in _HUB_ALIASES:
        host = DOCKER_HUB
    if host == DOCKER_HUB and name and "/" not in name:
        name = f"library/{name}"
    if _HOST.fullmatch(host) is None:
        raise BadInputError(f"registry {host!r} in image {text!r} is not a host or host:port", hint=_FORMS)
    parts = name.split("/")
    if len(name) > _NAME_MAX or any(_COMPONENT.fullmatch(part) is None for part in parts):
        hint = "image names are lower case" if name != name.lower() else _FORMS
        raise BadInputError(f"name {name!r} in image {text!r} is not valid", hint=hint)
    return RegistryRef(host, name, tag, digest if at else None)


def _layout(text: str, rest: str, *, archive: bool) -> LayoutRef:
    path, at, digest = rest.partition("@sha256:")
    if at:
        digest = check_oci_digest("sha256:" + digest, f"the digest in image {text!r}")
        ref = LayoutRef(path, None, digest, archive)
    else:
        # As skopeo: what follows the first colon is the tag, which may be a whole image name.
        path, colon, tag = rest.partition(":")
        ref = LayoutRef(path, tag if colon else None, None, archive)
    if not ref.path or "\0" in ref.path:
        raise BadInputError(f"image {text!r} names no path", hint=_FORMS)
    if ref.tag is not None and (not ref.tag or len(ref.tag) > _NAME_MAX):
        raise BadInputError(f"tag {ref.tag!r} in image {text!r} is not valid", hint=_FORMS)
    return ref


def _docker_archive(text: str, rest: str) -> DockerArchiveRef:
    path, colon, image = rest.partition(":")
    if not path or "\0" in path:
        raise BadInputError(f"image {text!r} names no path", hint=_FORMS)
    if not colon:
        return DockerArchiveRef(path)
    if image.startswith("@") and image[1:].isascii() and image[1:].isdigit():
        return DockerArchiveRef(path, number=int(image[1:]))
    found = parse_registry_ref(image)
    if found.digest:
        raise BadInputError(f"image {text!r} has a digest, by which such a file names nothing", hint=_FORMS)
    return DockerArchiveRef(path, found)
