"""The gRPC services of the driver: translate messages to calls, count how they end, and nothing else."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from floe import __version__
from floe.csi.request import check_place, read_publish
from floe.csi.volumes import Volumes
from floe.protos.gen.csi import csi_pb2 as pb
from floe.rpc.server import Server, unary
from floe.rpc.status import OUTCOMES, status_of

NAME = "csi.floe"
IDENTITY, NODE = "csi.v1.Identity", "csi.v1.Node"
THREADS = 16
_COUNTED = ("publish", "unpublish")
_NODE_ID_MAX = 256  # bytes, as the specification has it


class DriverService:
    """The methods of csi.v1.Identity and csi.v1.Node. `done` counts (method, outcome), the outcome a status in small letters."""

    def __init__(self, volumes: Volumes, node: str) -> None:
        self._volumes = volumes
        self._node = node.encode()[:_NODE_ID_MAX].decode(errors="ignore")
        self._lock = threading.Lock()
        # All from the start on: what appears with its first event shows no increase.
        self._done: Counter[tuple[str, str]] = Counter(dict.fromkeys(product(_COUNTED, OUTCOMES), 0))

    def get_plugin_info(self, _request: pb.GetPluginInfoRequest) -> pb.GetPluginInfoResponse:
        """GetPluginInfo."""
        return pb.GetPluginInfoResponse(name=NAME, vendor_version=__version__)

    def get_plugin_capabilities(self, _request: pb.GetPluginCapabilitiesRequest) -> pb.GetPluginCapabilitiesResponse:
        """GetPluginCapabilities: there is no controller."""
        return pb.GetPluginCapabilitiesResponse()

    def probe(self, _request: pb.ProbeRequest) -> pb.ProbeResponse:
        """Probe: who can dial finds it ready. A pack filesystem that does not run is no fault a restart of this would mend."""
        return pb.ProbeResponse(ready=BoolValue(value=True))

    def publish(self, request: pb.NodePublishVolumeRequest) -> pb.NodePublishVolumeResponse:
        """NodePublishVolume."""
        with self._counted("publish"):
            self._volumes.publish(read_publish(request))
        return pb.NodePublishVolumeResponse()

    def unpublish(self, request: pb.NodeUnpublishVolumeRequest) -> pb.NodeUnpublishVolumeResponse:
        """NodeUnpublishVolume."""
        with self._counted("unpublish"):
            self._volumes.unpublish(*check_place(request.volume_id, request.target_path))
        return pb.NodeUnpublishVolumeResponse()

    def get_capabilities(self, _request: pb.NodeGetCapabilitiesRequest) -> pb.NodeGetCapabilitiesResponse:
        """NodeGetCapabilities: none."""
        return pb.NodeGetCapabilitiesResponse()

    def get_info(self, _request: pb.NodeGetInfoRequest) -> pb.NodeGetInfoResponse:
        """NodeGetInfo."""
        return pb.NodeGetInfoResponse(node_id=self._node)

    def counted(self) -> dict[tuple[str, str], int]:
        """How many requests ended how: (publish or unpublish, outcome) -> number."""
        with self._lock:
            return dict(self._done)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        outcome = "ok"
        try:
            yield
        except Exception as error:
            outcome = status_of(error)[0].name.lower()
            raise
        finally:
            with self._lock:
                self._done[what, outcome] += 1


def server(address: Path, service: DriverService) -> Server:
    """The server of a driver at `address`, not started yet."""
    identity = {
        "GetPluginInfo": unary(service.get_plugin_info, pb.GetPluginInfoRequest.FromString),
        "GetPluginCapabilities": unary(service.get_plugin_capabilities, pb.GetPluginCapabilitiesRequest.FromString),
        "Probe": unary(service.probe, pb.ProbeRequest.FromString),
    }
    node = {
        "NodePublishVolume": unary(service.publish, pb.NodePublishVolumeRequest.FromString),
        "NodeUnpublishVolume": unary(service.unpublish, pb.NodeUnpublishVolumeRequest.FromString),
        "NodeGetCapabilities": unary(service.get_capabilities, pb.NodeGetCapabilitiesRequest.FromString),
        "NodeGetInfo": unary(service.get_info, pb.NodeGetInfoRequest.FromString),
    }
    handlers = [
        grpc.method_handlers_generic_handler(IDENTITY, identity),
        grpc.method_handlers_generic_handler(NODE, node),
    ]
    return Server(address, handlers, threads=THREADS)
