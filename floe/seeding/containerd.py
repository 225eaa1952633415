"""What a node's containerd has: images by name, blobs by digest, and the layers it unpacked with Floe's snapshotter. gRPC is here only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from floe.ingest.oci.media import Descriptor
from floe.protos.gen.containerd import content_pb2, images_pb2, snapshots_pb2
from floe.store.errors import AccessDeniedError, DeadlineError, FloeError, NotFoundError, UnavailableError

T = TypeVar("T")
SECONDS = 20.0  # for an answer
_RANGE = 8 << 20  # bytes of a blob, for each request
_MESSAGE_MAX = 64 << 20  # bytes; a list of all images is one message
# How containerd's core calls what a client committed: namespace, a number, and the client's own name, the chain id.
_LAYER = re.compile(r"([^/]+)/[0-9]+/(sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class StoredImage:
    """An image of a namespace: its `target` is a manifest or an index."""

    name: str
    target: Descriptor


class Node(Protocol):
    """A containerd, and the snapshotter that it uses. Thread-safe. UnavailableError: one of the two does not answer."""

    def ordinary_layers(self) -> Mapping[str, frozenset[str]]:
        """Chain ids of the layers that were unpacked the ordinary way, by namespace."""
        ...

    def images(self, namespace: str) -> list[StoredImage]:
        """All images of a namespace."""
        ...

    def read(self, namespace: str, digest: str) -> Iterator[bytes]:
        """A blob in pieces, unverified; NotFoundError when it is not there, or no more. Close it."""
        ...


class ContainerdNode:
    """The containerd at `address`, and Floe's snapshotter at `snapshotter`: paths of sockets. Close it."""

    def __init__(self, address: Path, snapshotter: Path) -> None:
        self._address, self._snapshotter = address, snapshotter
        options = (("grpc.max_receive_message_length", _MESSAGE_MAX),)
        self._channel = grpc.insecure_channel(f"unix:{address}", options=options)
        self._own = grpc.insecure_channel(f"unix:{snapshotter}", options=options)

    def close(self) -> None:
        """Close the connections."""
        self._channel.close()
        self._own.close()

    def ordinary_layers(self) -> Mapping[str, frozenset[str]]:
        """See Node.ordinary_layers. Lazy layers have names of Floe's own."""
        call = self._own.unary_stream(
            "/containerd.services.snapshots.v1.Snapshots/List",
            request_serializer=snapshots_pb2.ListSnapshotsRequest.SerializeToString,
            response_deserializer=snapshots_pb2.ListSnapshotsResponse.FromString,
        )
        request = snapshots_pb2.ListSnapshotsRequest(filters=["kind==committed"])
        found: dict[str, set[str]] = {}
        with _translated(f"the snapshotter at {self._snapshotter}"):
            for answer in call(request, timeout=SECONDS):
                for info in answer.info:
                    match = _LAYER.fullmatch(info.name)
                    if match is not None:
                        found.setdefault(match[1], set()).add(match[2])
        return {namespace: frozenset(chains) for namespace, chains in found.items()}

    def images(self, namespace: str) -> list[StoredImage]:
        """See Node.images."""
        call = self._channel.unary_unary(
            "/containerd.services.images.v1.Images/List",
            request_serializer=images_pb2.ListImagesRequest.SerializeToString,
            response_deserializer=images_pb2.ListImagesResponse.FromString,
        )
        with _translated(f"containerd at {self._address}"):
            answer = call(images_pb2.ListImagesRequest(), timeout=SECONDS, metadata=_in(namespace))
        return [
            StoredImage(image.name, Descriptor(image.target.media_type, image.target.digest, image.target.size))
            for image in answer.images
        ]

    def read(self, namespace: str, digest: str) -> Iterator[bytes]:
        """See Node.read."""
        call: Callable[..., Any] = self._channel.unary_stream(
            "/containerd.services.content.v1.Content/Read",
            request_serializer=content_pb2.ReadContentRequest.SerializeToString,
            response_deserializer=content_pb2.ReadContentResponse.FromString,
        )
        offset = 0
        while True:
            # In ranges that are read to their end before the reader has them: each has a deadline, however slow the reader is.
            request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=_RANGE)
            with _translated(f"blob {digest} of containerd at {self._address}"):
                data = b"".join(answer.data for answer in call(request, metadata=_in(namespace), timeout=SECONDS))
            if data:
                yield data
            offset += len(data)
            if len(data) < _RANGE:
                return


def _in(namespace: str) -> tuple[tuple[str, str], ...]:
    return (("containerd-namespace", namespace),)


class _translated:  # noqa: N801 - used like a function
    """gRPC's errors, about `what`, as Floe's."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, grpc.RpcError):
            raise self._told(error) from error

    def _told(self, error: Any) -> FloeError:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.NOT_FOUND:
            return NotFoundError(f"{self._what}: {details}")
        if code is grpc.StatusCode.PERMISSION_DENIED:
            return AccessDeniedError(f"{self._what}: {details}", hint="run as root")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{self._what} does not answer in time")
        return UnavailableError(f"{self._what} cannot be asked: {details}", hint="check that it runs, and its socket")
