"""An image as containerd holds it: the blobs that it fetched from the registry, not what it made of them.

Every blob is hashed as it passes, manifests too: what is published under a diff id is what the registry's manifest names,
whatever happened to this node's disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from floe.ingest.oci import media
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.references import RegistryRef, parse_registry_ref
from floe.ingest.oci.source import read_blob, verified
from floe.seeding.containerd import Node, StoredImage
from floe.store.errors import BadInputError


class ContainerdSource:
    """A Source: `image` of a namespace; `name` is how the registry's users call it. NotFoundError: a blob was given up."""

    def __init__(self, node: Node, namespace: str, image: StoredImage, name: str) -> None:
        self._node, self._namespace, self._image = node, namespace, image
        self.name = name

    def manifest(self, descriptor: Descriptor | None = None) -> tuple[bytes, str]:
        """See Source.manifest."""
        found = descriptor or self._image.target
        return read_blob(self, found, media.MAX_MANIFEST), found.media_type

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Source.open_blob."""
        yield from verified(self._node.read(self._namespace, descriptor.digest), descriptor, self.name)

    def close(self) -> None:
        """See Source.close: the node's connections are shared."""


def registry_name(name: str) -> RegistryRef | None:
    """How containerd's image `name` is called in its registry; None for what is none: the kubelet's `sha256:...`, imports."""
    with contextlib.suppress(BadInputError):
        ref = parse_registry_ref(name)
        # containerd writes names out; of one that is not, nobody knows what it was meant to be.
        return ref if str(ref) == name else None
    return None
