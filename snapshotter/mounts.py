"""Which mounts containerd is told to make. Pure, but for the two functions that ask the kernel once.

The reference is containerd's overlayfs snapshotter: a bind without parents, a read-only bind of a view's only parent,
else one overlay with the topmost parent first among the lower directories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from floe.snapshotter.schema import Kind, Snapshot
from floe.store.errors import BadInputError

# containerd's labels for user namespaces: "container:host:length[,...]".
UID_MAPPING = "containerd.io/snapshot/uidmapping"
GID_MAPPING = "containerd.io/snapshot/gidmapping"
# How containerd names the snapshot in which it changes all owners, before it commits it without this suffix.
REMAP_SUFFIX = "-remap"
# (uid_t)-1 and (gid_t)-1 mean "no change" to the kernel and name nobody.
_INVALID_ID = 2**32 - 1
_WHOLE_ID_MAP = ["0", "0", str(_INVALID_ID)]


@dataclass(frozen=True)
class Mount:
    """One mount as containerd's `mount` package takes it; `options` as in fstab."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """Where a snapshot's directories lie. Paths are short, so that 100 of them fit mount(2)'s page."""

    root: Path

    @property
    def snapshots(self) -> Path:
        """The directory of all snapshots' directories."""
        return self.root / "s"

    def directory(self, snapshot_id: int) -> Path:
        """All that belongs to a snapshot."""
        return self.snapshots / str(snapshot_id)

    def upper(self, snapshot_id: int) -> Path:
        """What the snapshot adds to its parents: a directory, or a lazy tree's bind."""
        return self.directory(snapshot_id) / "fs"

    def work(self, snapshot_id: int) -> Path:
        """Overlay's scratch directory of an active snapshot."""
        return self.directory(snapshot_id) / "work"

    def model(self, snapshot_id: int) -> Path:
        """The bind of the model tree that stands in for a stub layer."""
        return self.directory(snapshot_id) / "m"

    def clones(self, snapshot_id: int) -> Path:
        """The folder of the lower directories idmapped for a snapshot's user namespace."""
        return self.directory(snapshot_id) / "l"

    def layers(self, snapshot: Snapshot) -> list[Path]:
        """The lower directories a committed snapshot contributes, topmost first."""
        if snapshot.model is None:
            return [self.upper(snapshot.id)]
        if snapshot.alone:
            return [self.model(snapshot.id)]
        return [self.model(snapshot.id), self.upper(snapshot.id)]


def lower_directories(parents: Sequence[Snapshot], places: Places) -> list[Path]:
    """The lower directories of `parents` (topmost first), in that order."""
    return [path for parent in parents for path in places.layers(parent)]


def is_remap(key: str, name: str) -> bool:
    """Whether a Commit of `key` as `name` makes the copy of an image that containerd chowned for a user namespace.

    containerd does so (1.x always, 2.x for snapshotters without `remap-ids`) before a Prepare with mapping labels:
    Prepare of `<name>-remap` above the image, chown of all files, Commit as `<name>` (resolveSnapshotOptions in its
    client). What is stored is `<namespace>/<number>/<key>`, with a number for each.
    """
    return key.endswith(REMAP_SUFFIX) and _own_part(key.removesuffix(REMAP_SUFFIX)) == _own_part(name)


def _own_part(name: str) -> str:
    return name.split("/", 2)[-1]


def asks_for_mapping(snapshot: Snapshot, parents: Sequence[Snapshot]) -> bool:
    """Whether mounts of `snapshot` must map owners: labels ask for it, and containerd did not change owners itself."""
    labelled = UID_MAPPING in snapshot.labels or GID_MAPPING in snapshot.labels
    return labelled and not (parents and parents[0].remapped)


def needs_clones(snapshot: Snapshot, parents: Sequence[Snapshot], places: Places) -> bool:
    """Whether `snapshot` is an overlay for a user namespace with a mounted tree among its lower directories."""
    both = UID_MAPPING in snapshot.labels and GID_MAPPING in snapshot.labels
    mapped = both and asks_for_mapping(snapshot, parents)
    single_view = snapshot.kind is Kind.VIEW and len(lower_directories(parents, places)) == 1
    return mapped and not single_view and any(parent.tree or parent.model for parent in parents)


def snapshot_mounts(
    snapshot: Snapshot,
    lower: Sequence[Path],
    places: Places,
    overlay_options: Sequence[str],
    *,
    mapped: bool = False,
) -> list[Mount]:
    """The mounts of an active snapshot or view above the directories `lower` (topmost first).

    `mapped`: their owners are as they must be already, and containerd is not asked to map them.
    """
    mapping = [
        f"{option}={snapshot.labels[label]}"
        for option, label in (("uidmap", UID_MAPPING), ("gidmap", GID_MAPPING))
        if label in snapshot.labels and not mapped
    ]
    view = snapshot.kind is Kind.VIEW
    if not lower:
        return [_bind(places.upper(snapshot.id), mapping, "ro" if view else "rw")]
    if view and len(lower) == 1:
        return [_bind(lower[0], mapping, "ro")]
    options = mapping
    if not view:
        options = [*options, f"workdir={places.work(snapshot.id)}", f"upperdir={places.upper(snapshot.id)}"]
    options = [*options, "lowerdir=" + ":".join(map(str, lower)), *overlay_options]
    return [Mount("overlay", "overlay", tuple(options))]


def _bind(source: Path, mapping: Sequence[str], mode: str) -> Mount:
    return Mount("bind", str(source), (*mapping, mode, "rbind"))


def overlay_options(
    parameters: Path = Path("/sys/module/overlay/parameters"), uid_map: Path = Path("/proc/self/uid_map")
) -> tuple[str, ...]:
    """The options every overlay mount gets on this kernel.

    `index=off` where the module has that parameter: a lower directory may then serve several overlays at once.
    `userxattr` inside a user namespace, where trusted.* attributes cannot be set.
    """
    options: list[str] = []
    try:
        ids = uid_map.read_text().split()
    except OSError:
        ids = _WHOLE_ID_MAP
    if ids != _WHOLE_ID_MAP:
        options.append("userxattr")
    if (parameters / "index").exists():
        options.append("index=off")
    return tuple(options)


def root_owner(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """Host uid and gid that the container's root stands for; None without mapping labels. BadInputError."""
    if UID_MAPPING not in labels and GID_MAPPING not in labels:
        return None
    return _host_root(labels.get(UID_MAPPING, ""), UID_MAPPING), _host_root(labels.get(GID_MAPPING, ""), GID_MAPPING)


def _host_root(text: str, label: str) -> int:
    """The host id of container id 0 in `container:host:length[,...]`; no map at all means 0."""
    hint = "write it as container:host:length[,...] and map id 0"
    ranges: list[tuple[int, int, int]] = []
    for part in text.split(",") if text else []:
        numbers = part.split(":")
        if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise BadInputError(f"label {label} is malformed: {text!r}", hint=hint)
        container, host, length = map(int, numbers)
        if max(container, host, length) >= _INVALID_ID:
            raise BadInputError(f"label {label} has an id out of range: {text!r}", hint=hint)
        ranges.append((container, host, length))
    if not ranges:
        return 0
    for container, host, length in ranges:
        if container == 0 and length > 0:
            return host
    raise BadInputError(f"label {label} does not map the container's root: {text!r}", hint=hint)
