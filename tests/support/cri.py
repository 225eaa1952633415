"""What a kubelet says to a container runtime: pull, pods on the host's network, containers, exec, logs, over gRPC."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import grpc
import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).parent
NAME = "floe_tests_cri"


@functools.cache
def messages() -> ModuleType:
    """The messages of cri.proto, generated once for each run of the tests."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-I{NAME}={HERE}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={scratch}",
            f"{NAME}/cri.proto",
        ]
        assert protoc.main(arguments) == 0
        spec = importlib.util.spec_from_file_location(NAME, Path(scratch) / NAME / "cri_pb2.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return module


def _handler(runtime: str | None) -> dict[str, str]:
    """The annotation by which a pod says for which runtime its images are pulled."""
    return {"io.containerd.cri.runtime-handler": runtime} if runtime else {}


class Cri:
    """A client of containerd's CRI plugin. Everything it started and did not remove, `clean_up` removes."""

    def __init__(self, socket: Path, *, log_directory: Path, timeout: float = 60) -> None:
        self.pb = messages()
        self.socket = socket
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.timeout = timeout
        self.log_directory = log_directory
        self.pods: dict[str, object] = {}
        self.containers: list[str] = []
        self._numbers = itertools.count()

    def again(self) -> Cri:
        """Another client of the same daemon: closing it gives up what it has under way."""
        return Cri(self.socket, log_directory=self.log_directory, timeout=self.timeout)

    def call(self, service: str, method: str, request, *, timeout: float | None = None):
        answer = getattr(self.pb, f"{method}Response")
        rpc = self.channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return rpc(request, timeout=timeout or self.timeout, wait_for_ready=True)

    def _runtime(self, method: str, **fields):
        return self.call("RuntimeService", method, getattr(self.pb, f"{method}Request")(**fields))

    def _image(self, method: str, **fields):
        return self.call("ImageService", method, getattr(self.pb, f"{method}Request")(**fields))

    def ready(self) -> bool:
        """Whether the runtime can start host-network pods; its network may say it is not ready."""
        try:
            conditions = self._runtime("Status").status.conditions
        except grpc.RpcError:
            return False  # a daemon that has just started: "server is not initialized yet"
        return any(condition.type == "RuntimeReady" and condition.status for condition in conditions)

    def pull(self, image: str, *, runtime: str | None = None) -> str:
        """Pull, for a pod of the handler `runtime`; returns the image's id."""
        more = {"sandbox_config": self.pb.PodSandboxConfig(annotations=_handler(runtime))} if runtime else {}
        return self._image("PullImage", image=self.pb.ImageSpec(image=image), **more).image_ref

    def image(self, image: str):
        """The image's status, None when there is none."""
        answer = self._image("ImageStatus", image=self.pb.ImageSpec(image=image))
        return answer.image if answer.HasField("image") else None

    def remove_image(self, image: str) -> None:
        self._image("RemoveImage", image=self.pb.ImageSpec(image=image))

    def image_file_systems(self) -> list:
        return list(self._image("ImageFsInfo").image_filesystems)

    def run_pod(self, name: str, *, runtime: str | None = None) -> str:
        """A pod on the host's network, of the handler `runtime`; its id."""
        pb = self.pb
        host = pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE))
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="default", attempt=0),
            log_directory=str(self.log_directory),
            linux=pb.LinuxPodSandboxConfig(security_context=host),
            annotations=_handler(runtime),
        )
        pod = self._runtime("RunPodSandbox", config=config, runtime_handler=runtime or "").pod_sandbox_id
        self.pods[pod] = config
        return pod

    def run_container(
        self,
        pod: str,
        image: str,
        command: Sequence[str] = (),
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        image_volumes: Mapping[str, str] | None = None,
    ) -> str:
        """Create and start a container in a pod; its id. `image_volumes`: which image is mounted at which path."""
        pb = self.pb
        name = name or f"c{next(self._numbers)}"
        host = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE))
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            command=command,
            mounts=[
                pb.Mount(container_path=path, image=pb.ImageSpec(image=volume), readonly=True)
                for path, volume in (image_volumes or {}).items()
            ],
            envs=[pb.KeyValue(key=key, value=value.encode()) for key, value in (env or {}).items()],
            log_path=f"{pod}-{name}.log",  # of its own, also when numbers begin anew after a reboot
            linux=pb.LinuxContainerConfig(security_context=host),
        )
        container = self._runtime(
            "CreateContainer", pod_sandbox_id=pod, config=config, sandbox_config=self.pods[pod]
        ).container_id
        self.containers.append(container)
        self._runtime("StartContainer", container_id=container)
        return container

    def status(self, container: str):
        return self._runtime("ContainerStatus", container_id=container).status

    def wait(self, container: str, timeout: float = 30) -> int:
        """The exit code, once the container has ended."""
        until = time.monotonic() + timeout
        while (status := self.status(container)).state != self.pb.CONTAINER_EXITED:
            assert time.monotonic() < until, f"container {container} did not end within {timeout} s"
            time.sleep(0.02)
        return status.exit_code

    def logs(self, container: str) -> str:
        """What the container wrote: CRI's log format is `time stream tag text`."""
        lines = Path(self.status(container).log_path).read_text().splitlines()
        return "".join(line.split(" ", 3)[3] + "\n" for line in lines)

    def run(self, pod: str, image: str, command: Sequence[str], **settings) -> tuple[int, str]:
        """Run a command in a container of its own: exit code and output."""
        container = self.run_container(pod, image, command, **settings)
        code = self.wait(container)
        return code, self.logs(container)

    def execute(self, container: str, *command: str, timeout: int = 30) -> tuple[int, bytes, bytes]:
        """Run a command in a running container: exit code, stdout, stderr."""
        answer = self._runtime("ExecSync", container_id=container, cmd=command, timeout=timeout)
        return answer.exit_code, answer.stdout, answer.stderr

    def stop_container(self, container: str) -> None:
        self._runtime("StopContainer", container_id=container, timeout=0)

    def remove_container(self, container: str) -> None:
        self.stop_container(container)
        self._runtime("RemoveContainer", container_id=container)
        self.containers.remove(container)

    def remove_pod(self, pod: str) -> None:
        """Stop and remove a pod with its containers."""
        self._runtime("StopPodSandbox", pod_sandbox_id=pod)
        self._runtime("RemovePodSandbox", pod_sandbox_id=pod)
        self.pods.pop(pod, None)

    def list_pods(self) -> list[str]:
        """The ids of all pods, whoever started them."""
        return [pod.id for pod in self._runtime("ListPodSandbox").items]

    def clean_up(self) -> None:
        for container in list(self.containers):
            self.remove_container(container)
        for pod in list(self.pods):
            self.remove_pod(pod)

    def close(self) -> None:
        self.channel.close()
