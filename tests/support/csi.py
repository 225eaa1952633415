"""The CSI driver as a process beside a node's daemons, and what a kubelet says to it."""

import subprocess
import uuid

import grpc

from floe.csi.service import IDENTITY, NODE
from floe.protos.gen.csi import csi_pb2 as pb

MODE = pb.VolumeCapability.AccessMode
POD = "csi.storage.k8s.io/"


class Driver:
    """`floe csi` on the node of `daemons`; `client` is its kubelet. `kill` and `start` again, `close` at the end."""

    def __init__(self, daemons, rules="none"):
        self.daemons = daemons
        self.kubelet_dir = daemons.home / "kubelet"
        self.flags = ["--kubelet-dir", str(self.kubelet_dir), "--csi-rules", rules]
        self.address = self.kubelet_dir / "plugins/csi.floe/csi.sock"
        self.start()

    def start(self, *flags):
        self.process = self.daemons.start("csi", *self.flags, *flags)
        self.kubelet = Kubelet(self.address, self.kubelet_dir)

    def kill(self):
        self.kubelet.close()
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.kubelet.close()
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0

    def log(self):
        return self.daemons.log("csi").read_text()

    def close(self):
        if self.process.poll() is None:
            self.stop()
        for target in self.daemons.mounts():
            if target.startswith(f"{self.kubelet_dir}/"):
                subprocess.run(["umount", target], check=True, timeout=20)


class Pod:
    """What a kubelet says of a pod (podInfoOnMount), and where its volumes belong."""

    def __init__(self, kubelet, namespace="default"):
        self.kubelet, self.namespace, self.uid = kubelet, namespace, str(uuid.uuid4())
        self.context = {
            f"{POD}pod.name": "pod",
            f"{POD}pod.namespace": namespace,
            f"{POD}pod.uid": self.uid,
            f"{POD}serviceAccount.name": "default",
            f"{POD}ephemeral": "true",
        }

    def target(self, name="model"):
        """Made as far as a kubelet makes it: the driver makes the last part."""
        path = self.kubelet.folder / f"pods/{self.uid}/volumes/kubernetes.io~csi/{name}/mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Kubelet:
    """Requests as kubelets make them; grpc.RpcError carries the status."""

    def __init__(self, address, folder):
        self.folder = folder
        self.channel = grpc.insecure_channel(f"unix:{address}")

    def close(self):
        self.channel.close()

    def raw(self, service, method, data):
        """The answer's bytes to a request's bytes."""
        rpc = self.channel.unary_unary(f"/{service}/{method}", lambda sent: sent, lambda got: got)
        return rpc(data, timeout=60, wait_for_ready=True)

    def node(self, method, request, answer):
        return answer.FromString(self.raw(NODE, method, request.SerializeToString()))

    def identity(self, method, request, answer):
        return answer.FromString(self.raw(IDENTITY, method, request.SerializeToString()))

    def pod(self, namespace="default"):
        return Pod(self, namespace)

    def publish(self, pod, model, *, volume="csi-1", target=None, **changes):
        """An inline volume of a pod, with these fields of the request changed; where it is."""
        target = target or pod.target()
        request = inline(volume, target, {**pod.context, "model": model})
        for name, value in changes.items():
            if value is None:
                request.ClearField(name)
            elif isinstance(value, dict):
                request.ClearField(name)
                getattr(request, name).update(value)
            elif isinstance(value, bool | str):
                setattr(request, name, value)
            else:
                getattr(request, name).CopyFrom(value)
        self.node("NodePublishVolume", request, pb.NodePublishVolumeResponse)
        return target

    def unpublish(self, target, volume="csi-1"):
        request = pb.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(target))
        self.node("NodeUnpublishVolume", request, pb.NodeUnpublishVolumeResponse)


def inline(volume, target, context):
    """What a kubelet asks for an inline volume with readOnly: true; its access mode is always this one."""
    return pb.NodePublishVolumeRequest(
        volume_id=volume,
        target_path=str(target),
        readonly=True,
        volume_capability=capability(MODE.SINGLE_NODE_WRITER),
        volume_context=context,
    )


def capability(mode, **mount):
    return pb.VolumeCapability(mount=pb.VolumeCapability.MountVolume(**mount), access_mode=MODE(mode=mode))


def refused(call, *args, **kwargs):
    """The status' name and message that a call ends with."""
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    raise AssertionError("it was not refused")
