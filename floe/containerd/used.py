"""What is already on a node: containers and images that another snapshotter would not start. Asked through `ctr`.

containerd unpacks an image for another snapshotter when a container first wants it (1.6 and 2.1, CRI and `ctr run`), as long
as it has all layers. It has none of those that were pulled lazily, or thrown away after unpacking (discard_unpacked_layers).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.containerd import wanted
from floe.containerd.version import last_line, run
from floe.store.errors import NotFoundError, UnavailableError

_SOCKET, _ROOT = "/run/containerd/containerd.sock", "/var/lib/containerd"
_SECONDS = 60.0  # a node may have some hundred images to check
_SHOWN = 20  # of each kind in a message
# REF TYPE DIGEST STATUS (have/all) SIZE UNPACKED, as `ctr images check` prints them.
_CHECKED = re.compile(r"^(\S+)\s+\S+\s+(\w+:[0-9a-f]+)\s+(complete|incomplete)\b.*\s(true|false)\s*$")


@dataclass(frozen=True)
class Container:
    """`running`: it has a task, which goes on when the configuration changes."""

    namespace: str
    id: str
    image: str
    running: bool


@dataclass(frozen=True)
class Image:
    """`complete`: all its layers are in the content store; `unpacked`: for the snapshotter that was asked about."""

    namespace: str
    name: str
    digest: str
    complete: bool
    unpacked: bool


@dataclass(frozen=True)
class Daemon:
    """A containerd to ask: its socket, its root directory, and its `ctr`, None when there is none."""

    address: Path
    root: Path
    ctr: Path | None

    @classmethod
    def of(cls, config: Mapping[str, Any], binary: Path | None) -> Daemon:
        """Of the configuration it runs with. `ctr` is the one beside its program, else on the PATH."""
        beside = None if binary is None else binary.parent / "ctr"
        found = str(beside) if beside is not None and beside.is_file() else shutil.which("ctr")
        address = wanted.lookup(config, ("grpc", "address")) or _SOCKET
        return cls(Path(address), Path(config.get("root") or _ROOT), Path(found) if found else None)

    @property
    def is_fresh(self) -> bool:
        """Whether no containerd ever ran here: it keeps its images' names in this file."""
        return not (self.root / "io.containerd.metadata.v1.bolt/meta.db").exists()

    def check(self) -> None:
        """NotFoundError without `ctr`; UnavailableError when nobody listens."""
        if self.ctr is None:
            raise NotFoundError(
                "there is no ctr on this machine to ask containerd with", hint="install containerd's ctr"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
            tried.settimeout(5)
            try:
                tried.connect(str(self.address))
            except OSError as error:
                raise UnavailableError(
                    f"containerd does not answer at {self.address}: {error.strerror or error}",
                    hint="systemctl start containerd",
                ) from error

    def containers(self, snapshotter: str) -> list[Container]:
        """Those whose files are that snapshotter's, of all namespaces. UnavailableError."""
        found = []
        for namespace in self._namespaces():
            running = set(self._ask(namespace, "tasks", "ls", "-q").split())
            for name in self._ask(namespace, "containers", "ls", "-q").split():
                try:
                    told = json.loads(self._ask(namespace, "containers", "info", name))
                except UnavailableError:
                    if name in self._ask(namespace, "containers", "ls", "-q").split():
                        raise
                    continue  # removed in between
                if told.get("Snapshotter") == snapshotter:
                    found.append(Container(namespace, name, str(told.get("Image") or ""), name in running))
        return found

    def images(self, snapshotter: str) -> list[Image]:
        """All images of all namespaces, each once; none is `unpacked` for a snapshotter that is not loaded. UnavailableError."""
        found: list[Image] = []
        for namespace in self._namespaces():
            table = self._ask(namespace, "images", "check", "--snapshotter", snapshotter, table="REF")
            found += checked(namespace, table)
        return found

    def _namespaces(self) -> list[str]:
        return self._ask("default", "namespaces", "ls", "-q").split()

    def _ask(self, namespace: str, *arguments: str, table: str = "") -> str:
        """What ctr prints. One that printed the `table` that begins so has failed in the column about unpacking alone."""
        command = [str(self.ctr), "--address", str(self.address), "--namespace", namespace, *arguments]
        done = run(command, _SECONDS, hint="run it by hand")
        if done.returncode != 0 and not (table and done.stdout.startswith(table)):
            raise UnavailableError(f"{' '.join(command)} failed: {last_line(done.stderr)}", hint="run it by hand")
        return done.stdout


def checked(namespace: str, table: str) -> list[Image]:
    """The images of what `ctr images check` prints. CRI gives each several names: the first that people use is kept."""
    found: dict[str, Image] = {}
    for line in table.splitlines():
        if (match := _CHECKED.match(line)) is None:
            continue  # the heading, and images that are not for this platform
        name, digest, status, unpacked = match.groups()
        here = found.get(digest)
        if here is None or _rank(name) < _rank(here.name):
            found[digest] = Image(namespace, name, digest, status == "complete", unpacked == "true")
    return list(found.values())


def lost(images: list[Image]) -> list[Image]:
    """Those of which no container starts: layers are missing, and the snapshotter has not unpacked them."""
    return [image for image in images if not image.complete and not image.unpacked]


def told(containers: list[Container], images: list[Image]) -> Iterator[str]:
    """A line for each, and one for those that are too many."""
    for kind, lines in (
        ("containers", [f"container {c.id[:13]} of {c.image} ({c.namespace}){'' if c.running else ', stopped'}" for c in containers]),
        ("images", [f"image {i.name} ({i.namespace})" for i in images]),
    ):  # fmt: skip
        yield from lines[:_SHOWN]
        if len(lines) > _SHOWN:
            yield f"and {len(lines) - _SHOWN} more {kind}: --dry-run --json has them all"


def _rank(name: str) -> int:
    return 2 if name.startswith("sha256:") else 1 if "@" in name else 0
