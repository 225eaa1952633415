"""The gRPC service: translates messages to calls and errors to status, and nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from floe.protos.gen.containerd import mount_pb2, snapshots_pb2
from floe.snapshotter.directories import translated
from floe.snapshotter.mounts import Mount
from floe.snapshotter.resolver import MAX_WAITING
from floe.snapshotter.schema import Snapshot
from floe.snapshotter.snapshotter import Snapshotter
from floe.snapshotter.sockets import refuse_live_socket
from floe.snapshotter.status import status_of
from floe.store.errors import FloeError, UnavailableError

log = logging.getLogger(__name__)

SERVICE = "containerd.services.snapshots.v1.Snapshots"
# More than may wait for the store and for trees, so that ordinary requests always find a thread.
THREADS = 2 * MAX_WAITING + 16
# containerd's own limit (defaults.DefaultMaxRecvMsgSize).
MESSAGE_MAX = 16 << 20
# Entries in one message of List's stream, as containerd's proxy service does.
LIST_BLOCK = 100
# How long requests under way may take to end when the server stops, in seconds.
GRACE = 5.0

Q = TypeVar("Q")
A = TypeVar("A")


class SnapshotsService:
    """The methods of containerd.services.snapshots.v1.Snapshots. The field `snapshotter` is containerd's own."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def prepare(self, request: snapshots_pb2.PrepareSnapshotRequest) -> snapshots_pb2.PrepareSnapshotResponse:
        """Prepare."""
        mounts = self._snapshotter.prepare(request.key, request.parent, dict(request.labels))
        return snapshots_pb2.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def view(self, request: snapshots_pb2.ViewSnapshotRequest) -> snapshots_pb2.ViewSnapshotResponse:
        """View."""
        mounts = self._snapshotter.view(request.key, request.parent, dict(request.labels))
        return snapshots_pb2.ViewSnapshotResponse(mounts=_mounts(mounts))

    def mounts(self, request: snapshots_pb2.MountsRequest) -> snapshots_pb2.MountsResponse:
        """Mounts."""
        return snapshots_pb2.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def commit(self, request: snapshots_pb2.CommitSnapshotRequest) -> Empty:
        """Commit."""
        self._snapshotter.commit(request.name, request.key, dict(request.labels), request.parent)
        return Empty()

    def remove(self, request: snapshots_pb2.RemoveSnapshotRequest) -> Empty:
        """Remove."""
        self._snapshotter.remove(request.key)
        return Empty()

    def stat(self, request: snapshots_pb2.StatSnapshotRequest) -> snapshots_pb2.StatSnapshotResponse:
        """Stat."""
        return snapshots_pb2.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def update(self, request: snapshots_pb2.UpdateSnapshotRequest) -> snapshots_pb2.UpdateSnapshotResponse:
        """Update."""
        info = request.info
        found = self._snapshotter.update(info.name, dict(info.labels), list(request.update_mask.paths))
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(found))

    def list(self, request: snapshots_pb2.ListSnapshotsRequest) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
        """List, a block of entries for each message."""
        found = self._snapshotter.walk(list(request.filters))
        for start in range(0, len(found), LIST_BLOCK):
            block = found[start : start + LIST_BLOCK]
            yield snapshots_pb2.ListSnapshotsResponse(info=[_info(snapshot) for snapshot in block])

    def usage(self, request: snapshots_pb2.UsageRequest) -> snapshots_pb2.UsageResponse:
        """Usage."""
        usage = self._snapshotter.usage(request.key)
        return snapshots_pb2.UsageResponse(size=usage.size, inodes=usage.inodes)

    def cleanup(self, _request: snapshots_pb2.CleanupRequest) -> Empty:
        """Cleanup."""
        self._snapshotter.cleanup()
        return Empty()


def handlers(service: SnapshotsService) -> grpc.GenericRpcHandler:
    """The service as grpc takes it."""
    pb = snapshots_pb2
    methods = {
        "Prepare": _unary(service.prepare, pb.PrepareSnapshotRequest.FromString),
        "View": _unary(service.view, pb.ViewSnapshotRequest.FromString),
        "Mounts": _unary(service.mounts, pb.MountsRequest.FromString),
        "Commit": _unary(service.commit, pb.CommitSnapshotRequest.FromString),
        "Remove": _unary(service.remove, pb.RemoveSnapshotRequest.FromString),
        "Stat": _unary(service.stat, pb.StatSnapshotRequest.FromString),
        "Update": _unary(service.update, pb.UpdateSnapshotRequest.FromString),
        "List": grpc.unary_stream_rpc_method_handler(
            _streaming(service.list), pb.ListSnapshotsRequest.FromString, _serialize
        ),
        "Usage": _unary(service.usage, pb.UsageRequest.FromString),
        "Cleanup": _unary(service.cleanup, pb.CleanupRequest.FromString),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class Server:
    """A gRPC server on a unix socket only its owner may use."""

    def __init__(self, address: Path, snapshotter: Snapshotter) -> None:
        self.address = address
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rpc")
        self._server = grpc.server(
            self._threads,
            options=[("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.max_send_message_length", MESSAGE_MAX)],
        )
        self._server.add_generic_rpc_handlers((handlers(SnapshotsService(snapshotter)),))

    def start(self) -> None:
        """Listen. BusyError when another process listens on the socket; UnavailableError when it cannot be made."""
        with translated(f"socket {self.address}"):
            self.address.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # grpc would take its name away from under it.
        refuse_live_socket(self.address)
        # grpc makes the socket itself: only the umask can keep others out from its first moment.
        before = os.umask(0o177)
        try:
            bound = self._server.add_insecure_port(f"unix:{self.address}")
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {self.address}: {error}") from error
        finally:
            os.umask(before)
        if not bound:
            raise UnavailableError(f"cannot listen on {self.address}")
        self._server.start()

    def stop(self) -> None:
        """Refuse new requests, give those under way some time, then answer them as cancelled; back when all have ended.

        All of them end: what takes long looks whether the snapshotter is winding down, all else has a deadline.
        """
        self._server.stop(GRACE).wait()
        self._threads.shutdown()


def _unary(call: Callable[[Q], A], parse: Callable[[bytes], Q]) -> grpc.RpcMethodHandler:
    def handle(request: Q, context: grpc.ServicerContext) -> A:
        try:
            return call(request)
        except Exception as error:
            _abort(context, error)
            raise

    return grpc.unary_unary_rpc_method_handler(handle, parse, _serialize)


def _streaming(call: Callable[[Q], Iterator[A]]) -> Callable[[Q, grpc.ServicerContext], Iterator[A]]:
    def handle(request: Q, context: grpc.ServicerContext) -> Iterator[A]:
        try:
            yield from call(request)
        except Exception as error:
            _abort(context, error)
            raise

    return handle


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    code, message = status_of(error)
    if isinstance(error, FloeError):
        log.debug("%s: %s", code.name, message)
    else:
        log.error("a request failed: %s", message, exc_info=error)
    context.abort(code, message)


def _serialize(message: Empty) -> bytes:
    return message.SerializeToString()


def _mounts(mounts: list[Mount]) -> list[mount_pb2.Mount]:
    return [mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _info(snapshot: Snapshot) -> snapshots_pb2.Info:
    created, updated = Timestamp(), Timestamp()
    created.FromNanoseconds(snapshot.created)
    updated.FromNanoseconds(snapshot.updated)
    return snapshots_pb2.Info(
        name=snapshot.name,
        parent=snapshot.parent_name,
        kind=snapshot.kind.name,
        created_at=created,
        updated_at=updated,
        labels=snapshot.labels,
    )
