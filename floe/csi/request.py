"""What a kubelet asks for, read and refused where it cannot be meant. Pure."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from floe.protos.gen.csi import csi_pb2
from floe.store.errors import AccessDeniedError, BadInputError

MODEL = "model"
_KUBELETS = "csi.storage.k8s.io/"  # attributes that a kubelet adds where the CSIDriver says podInfoOnMount
_NAMESPACE, _POD, _UID = (f"{_KUBELETS}pod.{key}" for key in ("namespace", "name", "uid"))
# KUBELET_DIR/pods/UID/volumes/kubernetes.io~csi/NAME/mount, as kubelets name targets (pkg/volume/csi/csi_util.go).
_TARGET = re.compile(r"/pods/(?P<uid>[^/]+)/volumes/kubernetes\.io~csi/[^/]+/mount")
_MODE = csi_pb2.VolumeCapability.AccessMode
_READERS = (_MODE.SINGLE_NODE_READER_ONLY, _MODE.MULTI_NODE_READER_ONLY)
_FLAGS = {"ro", "nosuid", "nodev"}  # that is how every model is mounted
_PATH_MAX = 4095  # bytes


@dataclass(frozen=True)
class Wanted:
    """A volume at `target`, an absolute path: the model as its attribute `model` names it, and the pod that asks.

    `namespace`, `pod` and `uid` are what the request says; `pod_of` says whether to believe it.
    """

    volume: str
    target: Path
    model: str
    namespace: str = ""
    pod: str = ""
    uid: str = ""


def read_publish(request: csi_pb2.NodePublishVolumeRequest) -> Wanted:
    """BadInputError for what is missing, is not known, or asks for more than reading files."""
    volume, target = check_place(request.volume_id, request.target_path)
    context = dict(request.volume_context)
    model = context.get(MODEL, "")
    if not model:
        raise BadInputError(
            f"volume {volume} names no model", hint='give it volumeAttributes: {model: "NAME:TAG"} or NAME@DIGEST'
        )
    unknown = sorted(key for key in context if key != MODEL and "/" not in key)
    if unknown:
        raise BadInputError(
            f"volume {volume} has an unknown attribute {unknown[0]!r}", hint=f"the only one is {MODEL!r}"
        )
    _check_capability(volume, request)
    return Wanted(volume, target, model, context.get(_NAMESPACE, ""), context.get(_POD, ""), context.get(_UID, ""))


def check_place(volume: str, target: str) -> tuple[str, Path]:
    """A volume's id and the path it is published at. BadInputError."""
    if not volume:
        raise BadInputError("the request has no volume_id")
    if not target.startswith("/") or target.startswith("//") or os.path.normpath(target) != target or "\0" in target:
        raise BadInputError(f"target_path {target!r} is no absolute path without '.' and '..'")
    if len(os.fsencode(target)) > _PATH_MAX:
        raise BadInputError(f"target_path is longer than {_PATH_MAX} bytes")
    return volume, Path(target)


def pod_of(wanted: Wanted) -> str:
    """The namespace of the pod that asks. AccessDeniedError unless what the request says of the pod fits its target's path.

    The path is made by the kubelet from the pod's own uid. Attributes may come from whoever wrote the volume, where the
    cluster's CSIDriver does not have the kubelet write its own over them.
    """
    match = _TARGET.search(str(wanted.target))
    hint = "the CSIDriver csi.floe needs podInfoOnMount: true; apply install/kubernetes/overlays/csi"
    if not wanted.namespace or not wanted.uid:
        raise AccessDeniedError(f"volume {wanted.volume}: the request does not say which pod it is for", hint=hint)
    if match is None or match["uid"] != wanted.uid or match.end() != len(str(wanted.target)):
        raise AccessDeniedError(
            f"volume {wanted.volume}: the request is for pod {wanted.uid}, and {wanted.target} is not that pod's",
            hint=hint,
        )
    return wanted.namespace


def _check_capability(volume: str, request: csi_pb2.NodePublishVolumeRequest) -> None:
    capability = request.volume_capability
    if capability.WhichOneof("access_type") != "mount":
        raise BadInputError(
            f"volume {volume} is not asked for as files", hint="a model is no block device: volumeMode: Filesystem"
        )
    if not request.readonly and capability.access_mode.mode not in _READERS:
        raise BadInputError(
            f"volume {volume} is asked for to be written to, and models are read-only",
            hint="set readOnly: true in the pod's csi volume, or accessModes: [ReadOnlyMany] in the persistent volume and its claim",
        )
    if capability.mount.fs_type:
        raise BadInputError(
            f"volume {volume} asks for the file system {capability.mount.fs_type!r}", hint="leave fsType out"
        )
    for flag in capability.mount.mount_flags:
        if flag not in _FLAGS:
            raise BadInputError(
                f"volume {volume} asks for the mount option {flag!r}",
                hint=f"models are mounted {', '.join(sorted(_FLAGS))}",
            )
