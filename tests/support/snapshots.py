"""A client of a Snapshots service, the snapshotter in this process with layers that are plain directories, and mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from floe.protos.gen.containerd import mount_pb2
from floe.protos.gen.containerd import snapshots_pb2 as pb
from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.lazylayers import Usage
from floe.snapshotter.service import SERVICE, server
from floe.snapshotter.snapshotter import Snapshotter
from floe.store import mounttable
from floe.store.errors import BusyError, FloeError, UnavailableError, UntrustedError

REF = "containerd.io/snapshot.ref"
Status = grpc.StatusCode


class SnapshotsClient:
    """Each method one RPC; grpc.RpcError carries the status. `snapshotter` and `namespace` matter to containerd only."""

    def __init__(self, address: Path, *, snapshotter: str = "floe", namespace: str = "default", timeout: float = 20):
        self.channel = grpc.insecure_channel(f"unix:{address}")
        self.snapshotter = snapshotter
        self.metadata = (("containerd-namespace", namespace),)
        self.timeout = timeout

    def close(self) -> None:
        self.channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, request, answer):
        rpc = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return rpc(request, timeout=self.timeout, metadata=self.metadata, wait_for_ready=True)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[mount_pb2.Mount]:
        request = pb.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return list(self.call("Prepare", request, pb.PrepareSnapshotResponse).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[mount_pb2.Mount]:
        request = pb.ViewSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return list(self.call("View", request, pb.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[mount_pb2.Mount]:
        request = pb.MountsRequest(snapshotter=self.snapshotter, key=key)
        return list(self.call("Mounts", request, pb.MountsResponse).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        request = pb.CommitSnapshotRequest(
            snapshotter=self.snapshotter, name=name, key=key, labels=labels, parent=parent
        )
        self.call("Commit", request, Empty)

    def remove(self, key: str) -> None:
        self.call("Remove", pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key), Empty)

    def stat(self, key: str) -> pb.Info:
        request = pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)
        return self.call("Stat", request, pb.StatSnapshotResponse).info

    def update(self, name: str, labels: Mapping[str, str], *paths: str, **fields: str) -> pb.Info:
        info = pb.Info(name=name, labels=labels, **fields)
        mask = FieldMask(paths=paths) if paths else None
        request = pb.UpdateSnapshotRequest(snapshotter=self.snapshotter, info=info, update_mask=mask)
        return self.call("Update", request, pb.UpdateSnapshotResponse).info

    def list(self, *filters: str) -> list[pb.Info]:
        rpc = self.channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=pb.ListSnapshotsRequest.SerializeToString,
            response_deserializer=pb.ListSnapshotsResponse.FromString,
        )
        request = pb.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters)
        answers = rpc(request, timeout=self.timeout, metadata=self.metadata, wait_for_ready=True)
        return [info for answer in answers for info in answer.info]

    def names(self, *filters: str) -> set[str]:
        return {info.name for info in self.list(*filters)}

    def usage(self, key: str) -> pb.UsageResponse:
        return self.call("Usage", pb.UsageRequest(snapshotter=self.snapshotter, key=key), pb.UsageResponse)

    def cleanup(self) -> None:
        self.call("Cleanup", pb.CleanupRequest(snapshotter=self.snapshotter), Empty)


def status(call, *args, **kwargs) -> grpc.StatusCode:
    """The status a call ends with; OK when it succeeds."""
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        return error.code()
    return Status.OK


class DirectoryLayers:
    """Lazy layers for tests: a tree is a directory, bound read-only; `trees` maps digests to those in the node cache,
    `remote` those only the network has, `chains` chain ids to digests.

    `pack_ids` maps digests to their packs, `swept` counts sweeps. `fail` (stage to error) breaks a stage: resolve, fetch, mount, bind, unbind, release. `gate`, when set to an Event,
    holds up every network call until it is set. `signed` are the trees that somebody trusted vouches for, None: nobody asks. `network` counts network calls, `owners` the uses of each tree.
    """

    def __init__(self) -> None:
        self.trees: dict[str, Path] = {}
        self.remote: dict[str, Path] = {}
        self.chains: dict[str, str] = {}
        self.fail: dict[str, FloeError] = {}
        self.gate: threading.Event | None = None
        self.network = 0
        self.owners: dict[str, set[str]] = {}
        self.sick: set[str] = set()
        self.bound: list[Path] = []
        self.pack_ids: dict[str, frozenset[str]] = {}
        self.swept = 0
        self.expected: list[tuple[str, int]] = []
        self.unexpected: list[str] = []
        self.starts: list[tuple[str, str, list[str]]] = []
        self.signed: set[str] | None = None
        self.seen_signed: set[str] = set()

    def _stage(self, name: str) -> None:
        if name in self.fail:
            raise self.fail[name]

    def _network(self, name: str) -> None:
        self.network += 1
        if self.gate is not None:
            self.gate.wait(30)
        self._stage(name)

    def resolve(self, chain_id: str) -> str | None:
        self._network("resolve")
        return self.chains.get(chain_id)

    @property
    def trusted(self) -> tuple[str, ...]:
        return () if self.signed is None else ("key",)

    def vouch(self, tree: str) -> None:
        if self.signed is None:
            return
        self._network("vouch")
        if tree not in self.signed:
            raise UntrustedError(f"tree {tree} is not signed")
        self.seen_signed.add(tree)

    def vouched(self, tree: str) -> bool:
        return self.signed is None or tree in self.seen_signed

    def fetch(self, tree: str, deadline: float) -> None:
        if tree in self.trees:
            return
        self._network("fetch")
        if tree not in self.remote:
            raise UnavailableError(f"no tree {tree}")
        self.trees[tree] = self.remote[tree]

    def fetch_local(self, tree: str) -> bool:
        return tree in self.trees

    def expect(self, tree: str, nbytes: int) -> None:
        self.expected.append((tree, nbytes))
        self._stage("expect")

    def unexpect(self, tree: str) -> None:
        self.unexpected.append(tree)

    def started(self, key: str, name: str, trees: Sequence[str]) -> None:
        self.starts.append((key, name, list(trees)))

    def index_status(self) -> Mapping[str, object]:
        return {}

    def mount(self, tree: str, owner: str) -> None:
        self.owners.setdefault(tree, set()).add(owner)
        self._stage("mount")

    def bind(self, tree: str, target: Path) -> None:
        self._stage("bind")
        self.unbind(target)
        subprocess.run(["mount", "--bind", str(self.trees[tree]), str(target)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        self.bound.append(target)

    def unbind(self, target: Path) -> None:
        self._stage("unbind")
        while mounttable.mounts_at(target):
            subprocess.run(["umount", str(target)], check=True)

    def release(self, tree: str, owner: str) -> None:
        self._stage("release")
        self.owners.get(tree, set()).discard(owner)

    def healthy(self, tree: str) -> bool:
        return tree not in self.sick

    def usage(self, tree: str, without: AbstractSet[str] = frozenset()) -> Usage:
        """A page for the image and one for each pack."""
        packs = len(self.pack_ids.get(tree, frozenset()) - without)
        return Usage(4096 * (1 + packs), 1 + packs)

    def packs(self, tree: str) -> frozenset[str] | None:
        return self.pack_ids.get(tree, frozenset()) if tree in self.trees else None

    def uses(self) -> list[tuple[str, str]]:
        return [(tree, owner) for tree, owners in self.owners.items() for owner in owners]

    def sweep(self) -> None:
        self.swept += 1

    def busy(self) -> None:
        self.fail["release"] = BusyError("a read is in flight")

    def close(self) -> None:
        self.fail.clear()
        for target in self.bound:
            self.unbind(target)


class Node:
    """A snapshotter with a private root, served on a private socket by this process; `client` talks to it."""

    def __init__(self, base: Path, layers: DirectoryLayers | None = None, **settings: object) -> None:
        self.base = base
        base.mkdir(exist_ok=True)
        self.layers = layers or DirectoryLayers()
        # The socket's path is short, whatever the test's directory: sun_path ends at 107 bytes.
        self.run_dir = base / "run"
        self.config = SnapshotterConfig(
            address=self.run_dir / "s.sock",
            root=base / "root",
            run_dir=self.run_dir,
            cache_dir=base / "cache",
            store_url="memory://",
            **settings,
        )
        self.start()

    def start(self) -> None:
        self.snapshotter = Snapshotter(self.config, self.layers)
        self.failed = self.snapshotter.start()
        self.snapshotter.tidy()
        self.server = server(self.config.address, self.snapshotter)
        self.server.start()
        self.client = SnapshotsClient(self.config.address)

    def stop(self) -> None:
        self.client.close()
        self.server.stop()
        self.snapshotter.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def upper(self, mounts: Sequence[mount_pb2.Mount]) -> Path:
        """Where an active snapshot's own files go."""
        for option in mounts[0].options:
            if option.startswith("upperdir="):
                return Path(option.removeprefix("upperdir="))
        return Path(mounts[0].source)

    def layer(self, name: str, parent: str = "", files: Mapping[str, str] | None = None) -> str:
        """Commit a layer with these files, as an unpack does."""
        with mounted(self.client.prepare(f"extract {name}", parent), self.base) as root:
            for path, text in (files or {}).items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(text)
        self.client.commit(name, f"extract {name}")
        return name


@contextmanager
def mounted(mounts: Sequence[mount_pb2.Mount], base: Path) -> Iterator[Path]:
    """Make these mounts, as containerd would, at a new directory below `base`, and take them away afterwards."""
    target = base / f"mnt-{os.urandom(4).hex()}"
    target.mkdir()
    try:
        for mount in mounts:
            _mount(mount, target)
        yield target
    finally:
        while mounttable.mounts_at(target):
            subprocess.run(["umount", str(target)], check=True)
        shutil.rmtree(target)


def _mount(mount: mount_pb2.Mount, target: Path) -> None:
    if mount.type == "bind":
        subprocess.run(["mount", "--rbind", mount.source, str(target)], check=True)
        if "ro" in mount.options:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        return
    # Like containerd: with many layers the options only fit mount(2)'s page as paths relative to a common directory.
    options, cwd = list(mount.options), "/"
    lower = next(option for option in options if option.startswith("lowerdir="))
    paths = lower.removeprefix("lowerdir=").split(":")
    if sum(map(len, options)) > 3500 and len(paths) > 1:
        cwd = os.path.commonpath(paths)
        relative = "lowerdir=" + ":".join(os.path.relpath(path, cwd) for path in paths)
        options[options.index(lower)] = relative
    subprocess.run(
        ["mount", "-i", "-t", mount.type, "-o", ",".join(options), mount.source, str(target)], check=True, cwd=cwd
    )


@contextmanager
def nodes(base: Path, **defaults: object):
    """Makes nodes below `base`, with settings of their own or these; ends them all, whatever they wait for."""
    made: list[Node] = []

    def make(layers=None, **settings: object) -> Node:
        made.append(Node(base / f"n{len(made)}", layers, **{**defaults, **settings}))
        return made[-1]

    yield make
    for node in made:
        if node.layers.gate is not None:
            node.layers.gate.set()
        node.stop()
        node.layers.close()
