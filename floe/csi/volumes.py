"""Models published at directories of pods, and kept there: what the driver does, without gRPC.

A volume is a model mounted as `floe model mount` does it (floe.mount.modelmount), with the volume's id in its record. The
record says which tree it is, so a tag that moves, or goes, changes nothing for a pod that has it; the same request again
finds the record, and needs no store. Records are the run directory's: after a reboot there are none, and the kubelet asks again.

Concurrency: one operation for each target at a time, a second one is refused as the specification has it. The locks of
floe.mount guard the rest, against other processes too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from floe.csi.request import Wanted, pod_of
from floe.csi.rules import Rule, allows_all, check_allowed
from floe.mount.modelmount import ModelMount, model_mounts, mount_model, mounted_model, restore_model, umount_model
from floe.mount.mounter import MountState, TreeMounter
from floe.mount.mountinfo import mount_at, read_mounts
from floe.store.catalog import Catalog
from floe.store.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    DeadlineError,
    FloeError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from floe.store.ids import ModelRef
from floe.store.trees import TreeStore

log = logging.getLogger(__name__)

_FETCH = 60.0  # seconds for a tree and its packs' indexes; a kubelet waits two minutes for an answer


class Volumes:
    """Thread-safe. `parse` reads a model's name as people write it; `stop_packfs` ends a pack filesystem that a command left."""

    def __init__(
        self,
        catalog: Catalog,
        trees: TreeStore,
        mounter: TreeMounter,
        rules: Sequence[Rule],
        *,
        parse: Callable[[str], ModelRef],
        stop_packfs: Callable[[], None],
    ) -> None:
        self._catalog = catalog
        self._trees = trees
        self._mounter = mounter
        self._rules = rules
        self._parse = parse
        self._stop_packfs = stop_packfs
        self._lock = threading.Lock()  # guards _busy, _failing and restored
        self._busy: set[Path] = set()
        self._failing: set[str] = set()  # records whose restoring failed last time: said once
        self.restored: Counter[str] = Counter(ok=0, failed=0)  # by outcome

    def publish(self, wanted: Wanted) -> None:
        """Have the model at the target, which is made if need be; nothing happens where it is there already.

        AccessDeniedError: the rules; under rules a digest must be one that a tag of its name has had. AlreadyExistsError: another
        model or volume is there. ConflictError: the target is being worked on. NotFoundError: no such model. UnavailableError:
        no pack filesystem runs, or no store answers. Any error of `mount_model`; nothing is left behind then.
        """
        ref = self._parse(wanted.model)
        if self._rules:
            check_allowed(pod_of(wanted), ref.name, self._rules)
        with self._alone(wanted.target):
            record = mounted_model(wanted.target, self._mounter)
            if record is not None:
                if (record.volume, record.model) != (wanted.volume, str(ref)):
                    raise AlreadyExistsError(
                        f"{wanted.target} has {record.model} of {record.volume or 'a user'}, "
                        f"and not {ref} of {wanted.volume}"
                    )
                self._restore(record)
                return
            if ref.digest and not allows_all(wanted.namespace, self._rules):
                self._check_named(ref)
            digest, manifest = self._catalog.resolve_model(ref)
            tree = self._trees.fetch(manifest.tree.digest, _FETCH)
            mount_model(
                tree,
                wanted.target,
                self._mounter,
                model=str(ref),
                start_packfs=_refuse_without_packfs,
                stop_packfs=lambda: None,
                volume=wanted.volume,
            )
            who = f" for pod {wanted.namespace}/{wanted.pod}" if wanted.pod else ""
            log.info("volume %s%s: %s (%s) at %s", wanted.volume, who, ref, digest[:12], wanted.target)

    def _check_named(self, ref: ModelRef) -> None:
        """AccessDeniedError unless a tag of the name names that digest, or did: else any name would do for any model."""
        if not any(move.manifest == ref.digest for _, tag in self._catalog.tags_of(ref.name) for move in tag.moves):
            raise AccessDeniedError(
                f"no tag of {ref.name} names {ref.digest}, or did lately, and this node has rules about names",
                hint="give NAME:TAG, or the digest of a version of that model: floe model history NAME:TAG",
            )

    def unpublish(self, volume: str, target: Path) -> None:
        """Undo `publish`, and remove the directory; nothing happens where nothing is.

        PreconditionError: what is there is not this volume. BusyError while files of it are open or being read.
        """
        with self._alone(target):
            record = mounted_model(target, self._mounter)
            if record is not None and record.volume != volume:
                raise PreconditionError(f"{target} has {record.model} of {record.volume or 'a user'}, and not {volume}")
            if record is None and (there := mount_at(os.path.realpath(target), read_mounts())) is not None:
                raise PreconditionError(
                    f"{target} is a mount of {there.fstype} that this driver has not made", hint="unmount it yourself"
                )
            if record is not None:
                # Gone meanwhile: somebody used `floe umount`.
                with contextlib.suppress(NotFoundError):
                    umount_model(target, self._mounter, stop_packfs=self._stop_packfs)
                log.info("volume %s: %s is no longer at %s", volume, record.model, target)
            with contextlib.suppress(OSError):  # not there, or somebody put something into it
                target.rmdir()

    def published(self) -> list[ModelMount]:
        """The volumes of this boot."""
        return [record for record in model_mounts(self._mounter) if record.volume]

    def keep(self) -> None:
        """Mount again what was lost with a pack filesystem, and forget what lost its pod's directory. Never raises."""
        for record in self.published():
            place = Path(record.mountpoint)
            try:
                with self._alone(place):
                    if not place.parent.is_dir():
                        umount_model(place, self._mounter, stop_packfs=self._stop_packfs)
                        log.info(
                            "volume %s: %s is gone, so %s was forgotten", record.volume, place.parent, record.model
                        )
                    elif not self._well(record):
                        self._restore(record)
                        self._say(record, None)
            except (ConflictError, NotFoundError):
                continue  # the kubelet was faster
            except (FloeError, OSError) as error:
                self._say(record, error)
        with self._lock:
            self._failing &= {record.id for record in self.published()}

    def _restore(self, record: ModelMount) -> None:
        if not self._well(record):
            restore_model(record, self._trees.fetch(record.tree, _FETCH), self._mounter)

    def _well(self, record: ModelMount) -> bool:
        mounts = read_mounts()
        tree = mount_at(str(self._mounter.target(record.tree)), mounts)
        there = mount_at(record.mountpoint, mounts)
        if tree is None or there is None or there.device != tree.device:
            return False
        try:
            return self._mounter.check(record.tree) is MountState.HEALTHY
        except DeadlineError:
            return True  # silent, not dead: its readers wait, too

    def _say(self, record: ModelMount, error: Exception | None) -> None:
        with self._lock:
            self.restored["failed" if error else "ok"] += 1
            if error is None:
                self._failing.discard(record.id)
            elif record.id in self._failing:
                return
            else:
                self._failing.add(record.id)
        if error is None:
            log.info("volume %s: %s is at %s again", record.volume, record.model, record.mountpoint)
        else:
            log.warning("volume %s: %s is lost at %s: %s", record.volume, record.model, record.mountpoint, error)

    @contextmanager
    def _alone(self, target: Path) -> Iterator[None]:
        with self._lock:
            if target in self._busy:
                raise ConflictError(f"{target} is being mounted or unmounted", hint="the kubelet tries again")
            self._busy.add(target)
        try:
            yield
        finally:
            with self._lock:
                self._busy.remove(target)


def _refuse_without_packfs() -> None:
    raise UnavailableError(
        "the pack filesystem does not run on this node", hint="systemctl start floe-packfs; `floe doctor` says more"
    )
