"""When a container ran and first printed something, as containerd's CRI and the container's log tell.

Only for containers of Kubernetes that are still there, on the node that they run on: nobody else keeps what a container prints
with its time. Whatever is amiss, it is simply not known.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from floe.protos.gen.cri import container_pb2

# How containerd's CRI calls the snapshot of a container: its namespace, a number, the container's id.
_KEY = re.compile(r"k8s\.io/[0-9]+/([0-9a-f]{64})")
# Kubernetes' format of container logs (kubelet, "CRI log format"): RFC 3339 with nanoseconds, stream, whole or partial line, text.
_LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) (stdout|stderr) [FP] ")
_LINE_MAX = 128  # bytes that matter of a line
_SECONDS = 2.0  # for containerd's answer


def told_of(key: str, containerd: Path) -> list[dict[str, Any]]:
    """Events `running` and `output` of the container whose snapshot `key` is; none of what is not known."""
    match = _KEY.fullmatch(key)
    if match is None or not containerd.exists():
        return []
    with suppress(grpc.RpcError):
        status = _status(containerd, match[1])
        events: list[dict[str, Any]] = []
        if status.started_at:
            events.append({"kind": "running", "key": key, "at": status.started_at / 1e9})
        first = first_output(Path(status.log_path)) if status.log_path else None
        if first is not None:
            events.append({"kind": "output", "key": key, "at": first[0], "stream": first[1]})
        return events
    return []


def first_output(log: Path) -> tuple[float, str] | None:
    """When the first line of a container's log was written, in seconds since 1970, and to which stream.

    None: there is none yet, it is no such log, or it was rotated, and begins later than the container did.
    """
    try:
        if any(other.name.startswith(f"{log.name}.") for other in log.parent.iterdir()):
            return None
        fd = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            line = file.read(_LINE_MAX) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return None
    match = _LINE.match(line)
    if match is None:
        return None
    day, fraction, zone, stream = (part.decode() for part in (match[1], match[2] or b"0", match[3], match[4]))
    try:
        moment = dt.datetime.fromisoformat(day + zone.replace("Z", "+00:00"))
    except ValueError:  # as of a thirteenth month
        return None
    return moment.timestamp() + int(fraction.ljust(9, "0")) / 1e9, stream


def _status(containerd: Path, container: str) -> container_pb2.ContainerStatus:
    with grpc.insecure_channel(f"unix:{containerd}") as channel:
        call = channel.unary_unary(
            "/runtime.v1.RuntimeService/ContainerStatus",
            request_serializer=container_pb2.ContainerStatusRequest.SerializeToString,
            response_deserializer=container_pb2.ContainerStatusResponse.FromString,
        )
        request = container_pb2.ContainerStatusRequest(container_id=container)
        answer: container_pb2.ContainerStatusResponse = call(request, timeout=_SECONDS)
        return answer.status
