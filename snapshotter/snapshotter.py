"""What happens to a snapshot: containerd's rules, its overlayfs snapshotter being the reference.

Ordinary snapshots are overlay directories. A lazy one is a committed snapshot that appears when a Prepare names a chain
id the store holds: its `fs` is a bind of the layer's tree, and the answer is AlreadyExistsError.

Concurrency: the metastore orders everything that changes names; look-ups, mounts and measuring happen outside its lock.
Requests for one lazy layer queue behind each other; all others run side by side. Two gates bound how many may wait for
the store and for trees, so that the server has threads left for those who wait for nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from floe.snapshotter.cleaning import Cleaner
from floe.snapshotter.config import ERROR, SnapshotterConfig
from floe.snapshotter.directories import Directories
from floe.snapshotter.filters import info_fields, parse_filters
from floe.snapshotter.idmaps import Clones
from floe.snapshotter.lazylayers import LazyLayers, Usage
from floe.snapshotter.lazymounts import LazyMounts, tree_of
from floe.snapshotter.measures import Measures
from floe.snapshotter.metastore import REF, Metastore
from floe.snapshotter.modelsahead import ModelsAhead
from floe.snapshotter.mounts import (
    GID_MAPPING,
    UID_MAPPING,
    Mount,
    Places,
    asks_for_mapping,
    lower_directories,
    needs_clones,
    overlay_options,
    root_owner,
    snapshot_mounts,
)
from floe.snapshotter.prepares import IMAGE, Prepares
from floe.snapshotter.resolver import CACHE, DAMAGED, MAX_WAITING, PACKFS, REASONS, TIMEOUT, UNTRUSTED, Missed, Resolver
from floe.snapshotter.schema import Kind, Snapshot
from floe.snapshotter.turns import Gate, Turns
from floe.store.errors import (
    AlreadyExistsError,
    BadInputError,
    BusyError,
    DamagedError,
    DeadlineError,
    DiskError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UntrustedError,
)
from floe.store.stub import ANNOTATION, check_annotation

log = logging.getLogger(__name__)

# containerd's limit for a label's key and value together, in bytes (labels/validate.go).
LABEL_MAX = 4096
# What is counted besides fallbacks. All are told from the start on: what appears with its first event shows no increase.
EVENTS = ("lazy", "models_ahead", "refused", "cleanup_busy", "cleanup_failed")


@dataclass(frozen=True)
class Figures:
    """Figures for `floe status` and the exposition.

    `snapshots` counts them by kind (active, view, committed, lazy; lazy ones are not among the committed), `fallbacks`
    the layers unpacked the ordinary way by reason, `counters` other events since the start. `breaker` is its state,
    `mounts` how many trees are bound for snapshots, `remount_failures` how many could not be at the start, `unmounted` how
    many of these still are not, `trusted_keys` the ids of the keys whose signatures count, `index` how
    the index answers (LazyLayers.index_status), `prepares` how long Prepare took (Prepares.status).
    """

    snapshots: dict[str, int]
    fallbacks: dict[str, int]
    breaker: str
    mounts: int
    remount_failures: int
    counters: dict[str, int]
    trusted_keys: tuple[str, ...] = ()
    index: Mapping[str, Any] = field(default_factory=dict)
    prepares: Mapping[str, Any] = field(default_factory=dict)
    unmounted: int = 0


class Snapshotter:
    """The rules. Thread-safe. Call `start` before serving; `close` leaves every mount as it is."""

    def __init__(
        self,
        config: SnapshotterConfig,
        layers: LazyLayers,
        told: Callable[..., object] = lambda _kind, **_fields: None,
    ) -> None:
        """`told` is told of events, see EventLog.add."""
        self._config = config
        self._prepares = Prepares(told)
        self._layers = layers
        self._stop = threading.Event()
        self._places = Places(config.root)
        self._directories = Directories(self._places, self._stop)
        self._meta = Metastore(config.root / "metadata.db")
        self._overlay_options = overlay_options()
        self.resolver = Resolver(layers, config.prepare_timeout)
        self.lazy = LazyMounts(
            layers, self._directories, self.resolver, lives=self._meta.lives, timeout=config.prepare_timeout
        )
        self._clones = Clones(config.run_dir)
        self._lock = threading.Lock()
        self._turns: Turns[tuple[str, int]] = Turns("layer")
        self._store_gate = Gate(MAX_WAITING, "the store")
        self._tree_gate = Gate(MAX_WAITING, "trees")
        self._fallbacks: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._counters: Counter[str] = Counter(dict.fromkeys(EVENTS, 0))
        self._ahead = ModelsAhead(layers, config.prefetch_at_prepare, living=self._meta.walk, count=self._count)
        self._measures = Measures(self._meta, self._directories, layers)
        self._cleaner = Cleaner(
            self._meta,
            self._directories,
            layers,
            self.lazy,
            self._clones,
            count=self._count,
            stop=self._stop,
        )

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> list[Snapshot]:
        """Recover from a crash and mount every tree again; no network. Returns those that could not be.

        Directories no snapshot owns, half-made by a crash, are set aside for `tidy`.
        """
        self._cleaner.recover()
        return self.lazy.remount(found for found in self._meta.walk() if found.kind is Kind.COMMITTED)

    def tidy(self) -> None:
        """After `start`, at leisure: delete what it set aside, and what the last run's Remove left."""
        self._cleaner.tidy()

    def wind_down(self) -> None:
        """Have what takes long end early: this process is to stop."""
        self._stop.set()

    def close(self) -> None:
        """Stop: mounts, directories and names stay for the next start."""
        self._stop.set()
        self._meta.close()

    # -- the Snapshots service -------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make an active snapshot; AlreadyExistsError also when the layer asked for by REF is there, lazily."""
        with self._prepares.watch(key, parent, labels):
            return self._prepare(key, parent, labels)

    def _prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        check_labels(labels)
        above = self._meta.check_new(key, parent)
        parent_id = above.id if above else 0
        model = labels.get(ANNOTATION)
        model = check_annotation(model) if model else None
        chain = labels.get(REF)
        remaining = None
        with self._ahead.beside(labels):
            if chain:
                remaining = self._prepare_lazy(chain, parent_id, labels, model)
            elif model is not None and (missed := self._fetch_model(model)) is not None:
                self._refuse(f"model tree {model} cannot be had", missed, labels)
            made = self._create(Kind.ACTIVE, key, parent, labels, model=model)
            if remaining is not None:
                self.resolver.budgets.keep(made.id, remaining)
            mounts = self._first_mounts(made)
            if not chain:
                self._tell_start(made)
            return mounts

    def _tell_start(self, made: Snapshot) -> None:
        """A container is about to start, if what was made is its layer: over which trees, of which image."""
        chain = self._meta.chain(made.parent)
        trees = [tree for below in chain if (tree := tree_of(below)) is not None]
        if trees:
            image = next((below.labels[IMAGE] for below in chain if IMAGE in below.labels), "")
            self._prepares.note(trees=trees, image=image)
            log.info(
                "container %s is about to start over %d trees",
                made.name,
                len(trees),
                extra=self._prepares.about(made.labels, image=image),
            )
            self._layers.started(made.name, image, trees)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Make a read-only snapshot."""
        check_labels(labels)
        return self._first_mounts(self._create(Kind.VIEW, key, parent, labels))

    def mounts(self, key: str) -> list[Mount]:
        """The mounts of an active snapshot or view, again; PreconditionError for a committed one."""
        found = self._meta.get(key)
        if found.kind is Kind.COMMITTED:
            raise PreconditionError(f"snapshot {key!r} is committed: only active snapshots and views have mounts")
        self._ensure(found.parent)
        return self._mounts(found)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make the active snapshot `key` the committed one `name`. `parent`: see Metastore.commit."""
        check_labels(labels)
        if not name:
            raise BadInputError("the committed snapshot's name is empty")
        self._check_model(key)
        self._meta.commit(name, key, labels, parent, self._find_model)

    def remove(self, key: str) -> None:
        """Forget a snapshot; Cleanup gives back what it holds."""
        self._ahead.removed(self._meta.remove(key))

    def stat(self, key: str) -> Snapshot:
        """What is known of a snapshot."""
        return self._meta.get(key)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Change labels; see Metastore.update."""
        check_labels(labels)
        return self._meta.update(name, labels, paths)

    def walk(self, filters: Sequence[str]) -> list[Snapshot]:
        """The snapshots that match any of `filters`; all without filters."""
        matches = parse_filters(filters)
        return [
            found
            for found in self._meta.walk()
            if matches(info_fields(found.name, found.parent_name, found.kind.label, found.labels))
        ]

    def usage(self, key: str) -> Usage:
        """What a snapshot takes on this node's disk, without its parents."""
        return self._measures.usage(self._meta.get(key))

    def cleanup(self) -> None:
        """Give back what removed snapshots hold. What cannot be had yet is left for the next time, with a log line."""
        self._cleaner.cleanup()

    def remount(self, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
        """Try again, by the network too, what `start` could not mount; those that still cannot be. At leisure."""
        failed = []
        for snapshot in snapshots:
            if self._stop.is_set():
                break
            try:
                if self._meta.lives(snapshot.id):
                    self.lazy.ensure([snapshot])
            except NotFoundError:
                continue  # removed while its tree was fetched
            except Exception as error:
                # One bad snapshot must not keep the others.
                failed.append(snapshot)
                log.info("snapshot %r still cannot be mounted again: %r", snapshot.name, error)
        return failed

    def metrics(self) -> Figures:
        """How the snapshotter is."""
        counts = {"active": 0, "view": 0, "committed": 0, "lazy": 0}
        failed, unmounted = self.lazy.unmounted(), 0
        for found in self._meta.walk():
            counts["lazy" if found.tree else found.kind.label] += 1
            unmounted += found.id in failed  # those alone that still live
        with self._lock:
            fallbacks, counters = dict(self._fallbacks), dict(self._counters)
        return Figures(
            counts,
            fallbacks,
            self.resolver.breaker.state,
            self.lazy.count(),
            self.lazy.remount_failures,
            counters,
            self._layers.trusted,
            self._layers.index_status(),
            self._prepares.status(),
            unmounted,
        )

    # -- lazy layers -----------------------------------------------------------------------------------------------

    def _prepare_lazy(self, chain: str, parent: int, labels: Mapping[str, str], model: str | None) -> float:
        """AlreadyExistsError when the layer is there lazily; else how many seconds the pull's look-ups have left."""
        self._check_not_there(chain, parent)
        with ExitStack() as stack:
            try:
                stack.enter_context(self._queued(chain, parent))
            except (BusyError, DeadlineError) as error:
                found, remaining = Missed(TIMEOUT, error), self.resolver.budgets.remaining(parent)
            else:
                self._check_not_there(chain, parent)
                found, remaining = self._try_lazy(chain, parent, labels, model)
        if model is not None:
            self._refuse(f"model tree {model} cannot be mounted", found, labels)
        # What nobody signed is as good as not indexed: that is no failure of the store.
        failed = found.error is not None and found.reason != UNTRUSTED
        if self._config.on_store_error == ERROR and failed:
            self._refuse(f"layer {chain} cannot be had lazily and on_store_error is {ERROR!r}", found, labels)
        with self._lock:
            self._fallbacks[found.reason] += 1
        self._prepares.note(reason=found.reason, detail=str(found.error or ""))
        log.warning(
            "layer %s is unpacked the ordinary way, reason %s", chain, found, extra=self._prepares.about(labels)
        )
        return remaining

    def _check_not_there(self, chain: str, parent: int) -> None:
        if self._meta.lazy(chain, parent) is not None:
            raise AlreadyExistsError(f"layer {chain} is there already, lazily")

    def _try_lazy(self, chain: str, parent: int, labels: Mapping[str, str], model: str | None) -> tuple[Missed, float]:
        """Why the layer cannot be had lazily, and the seconds left; AlreadyExistsError when now it is there."""
        if model is not None:
            total = self.resolver.budgets.total
            return self.resolver.fetch_model(model) or self._show(chain, parent, labels, model, total), total
        with self._prepares.part("look_up"):
            found, remaining = self.resolver.find(chain, parent)
        if not isinstance(found, Missed):
            found = self._show(chain, parent, labels, found.tree, remaining)
        return found, remaining

    def _fetch_model(self, model: str) -> Missed | None:
        """Have a model's tree in the node cache; None when it is there, and may be mounted."""
        if self.resolver.ready(model):
            return None
        try:
            with self._queued(model, 0):
                return self.resolver.fetch_model(model)
        except (BusyError, DeadlineError) as error:
            return Missed(TIMEOUT, error)

    def _show(self, chain: str, parent: int, labels: Mapping[str, str], tree: str, remaining: float) -> Missed:
        """Mount a tree that is in the node cache and commit it as a snapshot: AlreadyExistsError says it is done.

        Missed when the tree cannot be mounted; UnavailableError when its directory is half-made. A directory in which
        a mount was tried is doomed and never handed out.
        """
        self._prepares.note(tree=tree)
        made = self._meta.begin_lazy(f"floe/{chain}/", parent, labels, chain, tree)
        try:
            with self._prepares.part("mount"):
                self.lazy.attach(made)
            self._meta.finish_lazy(made.id)
        except BaseException as error:
            self._meta.doom(made.id)
            half_made = self._places.upper(made.id).exists()
            if isinstance(error, AlreadyExistsError) or not isinstance(error, FloeError):
                raise
            if half_made:
                raise UnavailableError(f"layer {chain} was mounted by half: {error}", hint=error.hint) from error
            return Missed(_mount_reason(error), error)
        self.resolver.budgets.keep(made.id, remaining)
        self._count("lazy")
        log.info(
            "layer %s is served lazily from tree %s as %r",
            chain,
            tree,
            made.name,
            extra=self._prepares.about(labels, tree=tree),
        )
        raise AlreadyExistsError(f"layer {chain} is there now, lazily")

    def _refuse(self, what: str, missed: Missed, labels: Mapping[str, str]) -> NoReturn:
        self._count("refused")
        log.warning("%s: %s", what, missed, extra=self._prepares.about(labels))
        if missed.error is not None and missed.reason == UNTRUSTED:
            raise UntrustedError(f"{what}: {missed.error}", hint=missed.error.hint)
        raise UnavailableError(f"{what}: {missed}", hint=missed.error.hint if missed.error else "")

    @contextmanager
    def _queued(self, what: str, parent: int) -> Iterator[None]:
        """Queue the requests for one layer or model; DeadlineError when it takes too long, BusyError when too many wait."""
        with self._store_gate.enter(), self._turns.take((what, parent), self._config.prepare_timeout):
            yield

    def _ensure(self, snapshot_id: int) -> None:
        """Have the trees of that snapshot and its ancestors in place."""
        chain = self._meta.chain(snapshot_id)
        if not self.lazy.ready(chain):
            with self._tree_gate.enter():
                self.lazy.ensure(chain)

    # -- ordinary snapshots ----------------------------------------------------------------------------------------

    def _create(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str], *, model: str | None = None
    ) -> Snapshot:
        owner = root_owner(labels)
        above = self._meta.check_new(key, parent)
        if above is not None:
            self._ensure(above.id)
            owner = owner or self._directories.owner(self._places.layers(above)[0])
        made = self._directories.new(work=kind is Kind.ACTIVE, owner=owner)
        placed = made

        def place(snapshot_id: int) -> None:
            nonlocal placed
            self._directories.place(made, snapshot_id)
            placed = self._places.directory(snapshot_id)

        try:
            return self._meta.create(kind, key, parent, labels, place, model=model)
        except BaseException:
            self._directories.remove(placed)
            raise

    def _first_mounts(self, made: Snapshot) -> list[Mount]:
        """The mounts of a new snapshot, which is taken back when there can be none."""
        try:
            return self._mounts(made)
        except FloeError:
            self._meta.remove(made.name)
            raise

    def _mounts(self, snapshot: Snapshot) -> list[Mount]:
        parents = self._meta.chain(snapshot.parent)
        lower = lower_directories(parents, self._places)
        mapped = not asks_for_mapping(snapshot, parents)
        if needs_clones(snapshot, parents, self._places):
            maps = (snapshot.labels[UID_MAPPING], snapshot.labels[GID_MAPPING])
            lower = self._clones.have(lower, self._places.clones(snapshot.id), *maps)
            mapped = True
        return snapshot_mounts(snapshot, lower, self._places, self._overlay_options, mapped=mapped)

    def _find_model(self, active: Snapshot) -> tuple[str, bool] | None:
        """At Commit: the model the layer is a stub for, from its Prepare's annotation or its marker."""
        found = (active.model, True) if active.model is not None else self._directories.find_stub(active.id)
        if found is not None and not self._layers.vouched(found[0]):  # _check_model has asked, of the same layer
            raise UntrustedError(f"model tree {found[0]}, which layer {active.name!r} stands for, was not checked")
        return found

    def _check_model(self, key: str) -> None:
        """Before Commit, which holds the metastore: whether the model that the layer stands for may be mounted."""
        if not self._layers.trusted:
            return
        active = self._meta.get(key)
        if active.kind is not Kind.ACTIVE:
            return
        found = (active.model, True) if active.model is not None else self._directories.find_stub(active.id)
        if found is not None and (missed := self.resolver.vouch(found[0])) is not None:
            self._refuse(
                f"model tree {found[0]}, which layer {active.name!r} stands for, cannot be mounted",
                missed,
                active.labels,
            )

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1


def check_labels(labels: Mapping[str, str]) -> None:
    """BadInputError for a label longer than containerd allows."""
    for key, value in labels.items():
        if len(key.encode()) + len(value.encode()) > LABEL_MAX:
            raise BadInputError(f"label {key[:64]!r} and its value are longer than {LABEL_MAX} bytes")


def _mount_reason(error: FloeError) -> str:
    if isinstance(error, DeadlineError):
        return TIMEOUT
    if isinstance(error, (NoSpaceError, DiskError)):
        return CACHE
    return DAMAGED if isinstance(error, DamagedError) else PACKFS
