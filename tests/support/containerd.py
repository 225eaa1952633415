"""A private containerd: own root, state and socket, none of the host's touched, stopped with all its shims.

`versions()` lists what this machine has: 1.6 from Debian, 2.1 unpacked by install/setup.sh.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import sweep
from support.cri import Cri
from support.images import ARCHITECTURE, add, build_oci, oci_archive

from floe.store import mounttable

TOOLS = Path(__file__).resolve().parents[2] / ".tools"
HOST_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin:{TOOLS}/host/usr/bin:{TOOLS}/host/usr/sbin"
PAUSE = "floe.test/pause:1"
START_TIMEOUT = 30.0


@dataclass(frozen=True)
class Version:
    """An installed containerd: `name` as in "1.6", and the directory of its binaries."""

    name: str
    bin: Path

    @property
    def is_2(self) -> bool:
        return self.name.startswith("2")

    def __str__(self) -> str:
        return f"containerd-{self.name}"


def versions() -> list[Version]:
    """The containerds of this machine, oldest first."""
    found = {}
    places = (shutil.which("containerd", path=HOST_PATH), TOOLS / "containerd-2.1" / "bin" / "containerd")
    for path in places:
        if path and Path(path).exists():
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
            name = ".".join(text.lstrip("v").split(".")[:2])
            found[name] = Version(name, Path(path).parent)
    return [found[name] for name in sorted(found)]


def each_version(*, older: Collection[pytest.Mark | pytest.MarkDecorator] = ()) -> pytest.MarkDecorator:
    """Run a test on every containerd of this machine: the parameter `version`. `older`: marks of all but the newest."""
    *some, newest = versions() or [None]
    params = [pytest.param(version, marks=older) for version in some]
    skipped = () if newest else pytest.mark.skip("no containerd here: run install/setup.sh test")
    params.append(pytest.param(newest, marks=skipped))
    return pytest.mark.parametrize("version", params, ids=str)


class Containerd:
    """A running containerd. `snapshotter_address` adds the proxy plugin `floe` and makes CRI use it.

    `remap_ids`: with the capability of that name, on 2.x. `mirrors` maps registry hosts (host:port) to plain HTTP. `annotations` turns CRI's snapshot annotations on.
    `prefix`: words before the daemon's command line, as of a network namespace; its shims and containers are there too.
    """

    def __init__(
        self,
        version: Version,
        base: Path,
        *,
        snapshotter_address: Path | None = None,
        snapshotter_root: Path | None = None,
        snapshotter: str | None = None,
        registries: tuple[str, ...] = (),
        annotations: bool = False,
        remap_ids: bool = True,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.version = version
        self.prefix = tuple(prefix)
        self.base = base
        # Shims' socket names and containerd's own must stay below 108 bytes.
        self.run_dir = sweep.folder("ctr", Path("/run"))
        self.run_dir.chmod(0o711)  # containers in user namespaces pass through it
        self.root = base / "containerd-root"
        self.address = self.run_dir / "c.sock"
        self.snapshotter_address = snapshotter_address
        self.snapshotter_root = snapshotter_root
        self.snapshotter = snapshotter or ("floe" if snapshotter_address else "overlayfs")
        self.annotations = annotations
        self.remap_ids = remap_ids
        self.log = base / "containerd.log"
        self.env = {**os.environ, "PATH": f"{version.bin}:{HOST_PATH}", **(env or {})}
        self._hosts(registries)
        self.config = base / "containerd.toml"
        self.config.write_text(self._config())
        self._cris: list[Cri] = []
        self.start()

    def start(self) -> None:
        """Start the daemon, again after `kill`; returns when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, self.version.bin / "containerd", "--config", self.config],
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )
        until = time.monotonic() + START_TIMEOUT
        while self.ctr("version", check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"containerd did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def ctr(self, *arguments: str, check: bool = True, namespace: str = "k8s.io", timeout: float = 120):
        """Run ctr; the result's stdout and stderr are texts. With `check` a failure fails the test with what ctr said."""
        done = subprocess.run(
            [self.version.bin / "ctr", "--address", self.address, "--namespace", namespace, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self.env,
        )
        assert not check or done.returncode == 0, f"ctr {' '.join(map(str, arguments))}: {done.stderr}"
        return done

    def pid_of(self, container: str) -> int:
        """The first process of a running container."""
        tasks = [line.split() for line in self.ctr("tasks", "ls").stdout.splitlines()]
        return next(int(words[1]) for words in tasks if words and words[0] == container)

    def cri(self) -> Cri:
        """A client; what it leaves is removed at `stop`. The pause image is imported first."""
        logs = self.base / "logs"
        logs.mkdir(exist_ok=True)
        self._import_pause()
        cri = Cri(self.address, log_directory=logs)
        self._cris.append(cri)
        return cri

    def import_image(self, archive: Path, *, namespace: str = "k8s.io") -> None:
        """Import and unpack an archive of an OCI layout whose tags are whole image names."""
        local = ("--local",) if self.version.is_2 else ()
        self.ctr("images", "import", *local, "--snapshotter", self.snapshotter, str(archive), namespace=namespace)

    def _import_pause(self) -> None:
        if PAUSE in self.ctr("images", "ls", "-q").stdout.split():
            return
        directory = self.base / "pause"
        busybox = Path(shutil.which("busybox", path=HOST_PATH) or "/bin/busybox").read_bytes()
        build_oci(
            directory,
            [lambda tar: add(tar, "busybox", busybox, mode=0o755)],
            tag=PAUSE,
            command=("/busybox", "sleep", "1000000"),
        )
        self.import_image(oci_archive(directory, self.base / "pause.tar"))

    def kill(self) -> None:
        """kill -9 of the daemon alone: its containers run on."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """Stop the daemon, leave its containers."""
        self.process.terminate()
        self.process.wait(timeout=20)

    def stop(self) -> None:
        """Remove every container, then stop the daemon and its shims, then take away its files."""
        try:
            if self.process.poll() is None:
                self._remove_containers()
        finally:
            if self.process.poll() is None:
                self.terminate()
            self._stop_shims()
            for mount in reversed(mounttable.mounts()):
                if Path(mount.target).is_relative_to(self.run_dir) or Path(mount.target).is_relative_to(self.root):
                    subprocess.run(["umount", mount.target], check=True)
            shutil.rmtree(self.run_dir)

    def _remove_containers(self) -> None:
        try:
            for cri in self._cris:
                cri.clean_up()
        finally:
            for cri in self._cris:
                cri.close()
            for namespace in self.ctr("namespaces", "ls", "-q").stdout.split():
                for task in self.ctr("tasks", "ls", "-q", namespace=namespace).stdout.split():
                    self.ctr("tasks", "rm", "--force", task, namespace=namespace, check=False)

    def _stop_shims(self) -> None:
        """End the shims that name this daemon's socket, and what runs under them."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"containerd-shim-runc-v2") and os.fsencode(self.address) in words:
                try:
                    os.kill(int(process.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _hosts(self, registries: tuple[str, ...]) -> None:
        for registry in registries:
            directory = self.base / "certs.d" / registry
            directory.mkdir(parents=True)
            (directory / "hosts.toml").write_text(
                f'server = "http://{registry}"\n[host."http://{registry}"]\n  capabilities = ["pull", "resolve", "push"]\n'
            )

    def _config(self) -> str:
        proxy = ""
        if self.snapshotter_address:
            root = self.snapshotter_root or self.snapshotter_address.parent
            remap = 'capabilities = ["remap-ids"]\n' if self.version.is_2 and self.remap_ids else ""
            proxy = (
                f'[proxy_plugins.floe]\ntype = "snapshot"\naddress = "{self.snapshotter_address}"\n{remap}'
                f'[proxy_plugins.floe.exports]\nroot = "{root}"\n'
            )
        common = (
            f'root = "{self.root}"\nstate = "{self.run_dir}/state"\ndisabled_plugins = {{disabled}}\n'
            f'[grpc]\naddress = "{self.address}"\n[ttrpc]\naddress = "{self.run_dir}/t.sock"\n{proxy}'
        )
        disabled = '["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]'
        certs = f'config_path = "{self.base}/certs.d"'
        if not self.version.is_2:
            return (
                "version = 2\n"
                + common.replace("{disabled}", disabled)
                + (
                    f'[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "{PAUSE}"\nrestrict_oom_score_adj = true\n'
                    f'[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "{self.snapshotter}"\n'
                    f"disable_snapshot_annotations = {'false' if self.annotations else 'true'}\n"
                    f'[plugins."io.containerd.grpc.v1.cri".registry]\n{certs}\n'
                )
            )
        annotated = 'enable_remote_snapshot_annotations = "true"\n' if self.annotations and proxy else ""
        return (
            "version = 3\n"
            + common.replace("{disabled}", disabled)
            + annotated
            + (
                f'[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "{self.snapshotter}"\n'
                f'[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "{PAUSE}"\n'
                f'[plugins."io.containerd.cri.v1.images".registry]\n{certs}\n'
                '[plugins."io.containerd.cri.v1.runtime"]\nrestrict_oom_score_adj = true\n'
                '[plugins."io.containerd.nri.v1.nri"]\ndisable = true\n'
                '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\n'
                f'platform = "linux/{ARCHITECTURE}"\nsnapshotter = "{self.snapshotter}"\n'
            )
        )
