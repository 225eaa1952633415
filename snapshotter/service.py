"""The gRPC service: translates messages to calls and errors to status, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from floe.protos.gen.containerd import mount_pb2, snapshots_pb2
from floe.rpc.server import Server, streaming, unary
from floe.snapshotter.mounts import Mount
from floe.snapshotter.resolver import MAX_WAITING
from floe.snapshotter.schema import Snapshot
from floe.snapshotter.snapshotter import Snapshotter

SERVICE = "containerd.services.snapshots.v1.Snapshots"
# More than may wait for the store and for trees, so that ordinary requests always find a thread.
THREADS = 2 * MAX_WAITING + 16
# Entries in one message of List's stream, as containerd's proxy service does.
LIST_BLOCK = 100


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
        "Prepare": unary(service.prepare, pb.PrepareSnapshotRequest.FromString),
        "View": unary(service.view, pb.ViewSnapshotRequest.FromString),
        "Mounts": unary(service.mounts, pb.MountsRequest.FromString),
        "Commit": unary(service.commit, pb.CommitSnapshotRequest.FromString),
        "Remove": unary(service.remove, pb.RemoveSnapshotRequest.FromString),
        "Stat": unary(service.stat, pb.StatSnapshotRequest.FromString),
        "Update": unary(service.update, pb.UpdateSnapshotRequest.FromString),
        "List": streaming(service.list, pb.ListSnapshotsRequest.FromString),
        "Usage": unary(service.usage, pb.UsageRequest.FromString),
        "Cleanup": unary(service.cleanup, pb.CleanupRequest.FromString),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def server(address: Path, snapshotter: Snapshotter) -> Server:
    """The server of a snapshotter at `address`, not started yet."""
    return Server(address, [handlers(SnapshotsService(snapshotter))], threads=THREADS)


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
