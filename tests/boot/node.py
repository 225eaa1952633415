"""A machine with containerd, a registry and a store, of which `bootstrap-node.sh` makes a node; its kubelet is here."""

import hashlib
import json
import random
from pathlib import Path

import grpc
from boot.machine import HOST, LONG, PATIENCE, GuestError, Machine
from support.cri import Cri
from support.mounts import until

REGISTRY = "localhost:5000"  # in the guest
LAZY, PAUSE = f"{REGISTRY}/lazy:1", f"{REGISTRY}/pause:1"
FILES = 16
APART = 10_000_000  # bytes between two of the lazy image's files: more than read-ahead as the tests set it gets
STORE = "/var/store"
BOOTSTRAP = "/srv/checkout/install/bootstrap-node.sh"
CONFIG = "/etc/containerd/config.toml"
_OTHERS = (
    "/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/store", "/var/lib/containerd",
    "/var/lib/systemd", "/opt/containerd", "/root/.cache",
)  # fmt: skip
_CRI = '[plugins."io.containerd.grpc.v1.cri"]'


def content(number):
    """Of the lazy image's file `number`, which no compression makes smaller."""
    return random.Random(number).randbytes(700_000)


def lazy_files():
    """By path, the files of the lazy image: those that tests read, and something after each that nobody reads."""
    for number in range(FILES):
        yield f"data/{number}", content(number)
        yield f"data/{number}.next", random.Random(f"{number}.next").randbytes(APART)


def expected(numbers):
    """The digests of those files."""
    return [hashlib.md5(content(number), usedforsecurity=False).hexdigest() for number in numbers]


class BootedNode(Machine):
    """A machine with containerd, a registry, and a store; nothing of Floe's yet."""

    def __init__(self, folder, tests_disk, registry, disks=()):
        super().__init__(folder, tests_disk, disks)
        self.write("/etc/registry", f"REGISTRY={HOST}:{registry.address.rpartition(':')[2]}\n")
        text = self.read(CONFIG)
        assert _CRI in text
        self.write(CONFIG, text.replace(_CRI, f'{_CRI}\n    sandbox_image = "{PAUSE}"  # no other is here'))
        self.sh(f"cp -a /srv/store {STORE}; systemctl restart containerd; mkdir /var/log/pods")
        self.before, self.at_first = self.read(CONFIG), self.everything()

    def everything(self):
        """The names of all files that somebody may have left: what containerd and systemd keep changes by itself."""
        theirs = " -o ".join(f"-path {path}" for path in _OTHERS)
        return self.sh(f"find / -xdev '(' {theirs} ')' -prune -o -printf '%p %y %l\n' | sort").splitlines()

    def bootstrap(self, *flags, check=True, program=(BOOTSTRAP,)):
        done = self.run(*program, *flags, check=False, seconds=LONG)
        if check and done.returncode != 0:
            raise GuestError(f"bootstrap-node.sh {flags}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def process_of(self, container):
        """Of a container's first process."""
        listed = self.run("ctr", "-n", "k8s.io", "tasks", "ls").stdout.splitlines()
        return next(line.split()[1:] for line in listed if line.startswith(container))

    def cri(self):
        """A client of its containerd, once that is ready."""
        found = GuestCri(self)
        until(found.ready, PATIENCE)
        return found

    def status(self):
        return json.loads(self.run("floe", "status", "--json").stdout)


class GuestCri(Cri):
    """The machine's kubelet, on this one."""

    def __init__(self, machine):
        super().__init__(Path("/containerd.sock"), log_directory=Path("/var/log/pods"), timeout=PATIENCE)
        self.machine = machine
        self.channel.close()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{machine.cri_port}")

    def digests(self, container, numbers):
        """Of the image's files, as the container reads them."""
        code, out, error = self.execute(
            container, "md5sum", *(f"/data/{number}" for number in numbers), timeout=PATIENCE
        )
        assert (code, error) == (0, b"")
        return [line.split()[0] for line in out.decode().splitlines()]

    def drain(self):
        """No pod and no image is left."""
        for pod in self.list_pods():
            self.remove_pod(pod)
        self.containers.clear()
        for image in (LAZY, PAUSE):
            self.remove_image(image)

    def logs(self, container):
        lines = self.machine.read(self.status(container).log_path).splitlines()
        return "".join(line.split(" ", 3)[3] + "\n" for line in lines)
