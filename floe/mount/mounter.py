"""One mount of each tree on this node, shared by all its users.

A tree is mounted at `<run dir>/trees/<digest>` as long as it has owners; what a container or a user sees is a bind of
that. So there is one superblock a tree, and one page cache. When all packs are complete in the node cache the mount lies
straight on their files, which are pinned; else on the pack filesystem at `<run dir>/packs`.

Concurrency: whatever changes a tree's mount or owners holds the lock of that tree, against threads and processes.
Different trees do not wait for each other. No lock is held by a mount process that hangs.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from floe.mount.holders import holders_hint
from floe.mount.home import TreesHome
from floe.mount.mountinfo import MountEntry, mount_at, read_mounts
from floe.mount.native import Pins
from floe.mount.placement import Placement
from floe.mount.quiet import Packfs, ensure_quiet, is_mount_of, lives_on, packfs_device, superblock_alive
from floe.mount.refusals import refusal
from floe.mount.runner import HELPER_COMMAND, PORTABLE_COMMAND, MountRunner, OperationError
from floe.mount.state import METADATA, NATIVE, PACKFS, MountRecord, RunState
from floe.mount.trees import PackCache, Tree
from floe.protos.packfs_control import PackfsClient, announce
from floe.store.errors import BusyError, DeadlineError, FloeError, PreconditionError, UnavailableError
from floe.store.ids import check_hexdigest
from floe.store.mounttable import PORTABLE_TYPE, TREE_TYPES
from floe.store.process import is_alive

_log = logging.getLogger(__name__)
READ_AHEAD_KB = 1024  # mmap faults then arrive in large reads
_DEAD = {errno.ENOTCONN, errno.EIO, errno.ECONNABORTED, errno.ESTALE}


class MountState(enum.Enum):
    """HEALTHY: mounted, and what lies below answers. MISSING: not mounted. DEAD: reads fail, mount it anew."""

    HEALTHY = "healthy"
    MISSING = "missing"
    DEAD = "dead"


class TreeMounter:
    """Thread-safe, and safe beside other processes on the same `run_dir`. Needs root.

    `deadline` in seconds bounds each mount operation. `loop` says whether loop devices are put below EROFS: "auto"
    when this kernel or the cache's disk needs it, "always", "never". `kind` says what mounts: "erofs", "portable" (a
    process with pyfuse3 for each tree), or "auto": EROFS if the kernel has it. `patience`: seconds that an unmount waits for
    reads in flight. `packfs` and `command` are for tests.
    """

    def __init__(
        self,
        run_dir: Path,
        cache: PackCache,
        *,
        deadline: float = 10,
        loop: str = "auto",
        kind: str = "auto",
        patience: float = 0.2,
        packfs: Packfs | None = None,
        command: Sequence[str] = HELPER_COMMAND,
    ) -> None:
        self.run_dir = Path(os.path.realpath(run_dir))
        self.cache = cache
        self.state = RunState(self.run_dir)
        self.pins = Pins(cache, self.state, self.run_dir)
        self.packfs: Packfs = packfs or PackfsClient(self.run_dir)
        self.runner = MountRunner(deadline, self.state.stuck, command)
        portable = MountRunner(deadline, self.state.stuck, PORTABLE_COMMAND)
        self.placement = Placement(loop, self.runner, self.state, cache.roots, kind=kind, portable=portable)
        self._patience = patience
        self._wait = 3 * deadline  # seconds for a lock: another process may need some operations
        self.home = TreesHome(self.runner, self.state, self._wait)

    # what users of trees call

    def mount(self, tree: Tree, owner: str) -> Path:
        """Have `tree` mounted and record `owner` as a user of it, durably; both may be so already. The mountpoint.

        A mount found dead is replaced. UnavailableError when the tree is not whole in the cache and no pack filesystem
        runs; DeadlineError, DamagedError, UnsupportedError, AccessDeniedError; nothing is left behind then.
        """
        check_hexdigest(tree.digest, "tree digest")
        self.home.ensure()
        with self.locked(tree.digest):
            others = self.state.owners(tree.digest) - {owner}
            added = self.state.add_owner(tree.digest, owner)
            try:
                self._ensure_mounted(tree, in_use=bool(others))
            except BaseException:
                if added:
                    self.state.remove_owner(tree.digest, owner)
                raise
        return self.target(tree.digest)

    def release(self, digest: str, owner: str) -> None:
        """End a use, durably; one that is not recorded is no error. The last one unmounts the tree.

        BusyError while it is bound somewhere, has files open or reads in flight, DeadlineError when the kernel does not
        answer: the owner is gone all the same, and another `release` or `sweep` unmounts.
        """
        check_hexdigest(digest, "tree digest")
        with self.locked(digest):
            self.state.remove_owner(digest, owner)
            if not self.state.owners(digest):
                self.unmount(digest)

    def bind(self, digest: str, target: Path, *, model: bool = False) -> None:
        """Show a mounted tree at the directory `target`, read-only; for a `model` without setuid and devices too.

        Nothing happens when it is there already; a bind of an earlier, dead mount of the tree is replaced. BusyError
        when something else is mounted there, NotFoundError without the directory, PreconditionError without the tree.
        """
        place = os.path.realpath(target)
        with self.locked(check_hexdigest(digest, "tree digest")):
            mounts = read_mounts()
            tree = mount_at(str(self.target(digest)), mounts)
            if tree is None:
                raise PreconditionError(f"tree {digest} is not mounted", hint="mount it before binding it")
            there = mount_at(place, mounts)
            if there is not None:
                if there.device == tree.device:
                    return
                self._remove_stale_bind(digest, there)
            attributes = ["ro", "nosuid", "nodev"] if model else ["ro"]
            with _refusals(f"tree {digest} cannot be shown at {place}"):
                self.runner.run("bind", source=tree.target, target=place, attributes=attributes)

    def unbind(self, target: Path) -> None:
        """Undo `bind`; nothing happens when nothing is mounted there. BusyError while files of it are open."""
        place = os.path.realpath(target)
        mounts = read_mounts()
        there = mount_at(place, mounts)
        if there is None:
            return
        if there.fstype not in TREE_TYPES:
            raise PreconditionError(f"{place} is a mount of {there.fstype}, not of a tree", hint="unmount it yourself")
        if sum(entry.device == there.device for entry in mounts) == 1:
            # The last one takes the superblock with it, and waits for reads in flight on it.
            for record in [*self.state.records(), *(record for _, record in self.state.lingering())]:
                if is_mount_of(record, there):
                    ensure_quiet(record, self.run_dir, self.packfs, self.runner, patience=self._patience)
        self.umount(there)

    def ensure_removable(self, digest: str, owner: str, target: str) -> None:
        """BusyError when taking away `target`, the last bind, and `owner`, the last one, would wait for reads."""
        mounts = read_mounts()
        record = self.state.record(digest)
        shown = [entry.target for entry in mounts if record is not None and is_mount_of(record, entry)]
        if (
            record is not None
            and not self.uses(digest) - {owner}
            and not set(shown) - {target, str(self.target(digest))}
        ):
            ensure_quiet(record, self.run_dir, self.packfs, self.runner, patience=self._patience)

    def check(self, digest: str) -> MountState:
        """Whether a tree can be read. DeadlineError when what lies below is silent: then its reads wait, too."""
        mount = mount_at(str(self.target(digest)), read_mounts())
        if mount is None:
            return MountState.MISSING
        record = self.state.record(digest)
        places = [mount.target]
        if record is not None and record.server and not is_alive(record.server):
            return MountState.DEAD
        if record is not None and record.mode == PACKFS:
            if packfs_device(self.run_dir) != record.packfs_device:
                return MountState.DEAD  # a new server does not heal the trees of the old one
            places.append(str(self.run_dir / "packs"))
        errnos = self.runner.run("ask", paths=places)["errnos"]
        return MountState.DEAD if _DEAD.intersection(errnos) else MountState.HEALTHY

    def packfs_is_dead(self) -> bool:
        """Whether the pack filesystem that is mounted has lost its connection. One that is held, and not served, has not."""
        try:
            errnos = self.runner.run("ask", paths=[str(self.run_dir / "packs")])["errnos"]
        except DeadlineError:
            return False
        return bool(_DEAD.intersection(errnos))

    def uses(self, digest: str) -> set[str]:
        """The owners of a tree."""
        return self.state.owners(digest)

    def mounts(self) -> list[MountRecord]:
        """How each tree is mounted."""
        return self.state.records()

    def stuck(self) -> dict[int, str]:
        """Mount processes that hang in the kernel: pid -> what they were told to do."""
        return self.runner.stuck()

    def sweep(self) -> list[str]:
        """Remove what nobody owns: mounts, records, pins, loop devices. What was removed or could not be, in words."""
        from floe.mount.sweep import sweep  # noqa: PLC0415 - it is built on this class

        return sweep(self)

    # what the modules beside this one need, with the tree's lock held

    def target(self, digest: str) -> Path:
        """Where a tree is mounted."""
        return self.state.trees / digest

    @contextmanager
    def locked(self, digest: str) -> Iterator[None]:
        """Hold a tree's lock."""
        with self.state.lock(digest, self._wait):
            yield

    def unmount(self, digest: str) -> None:
        """Unmount a tree that nobody owns. BusyError, DeadlineError."""
        mounts = read_mounts()
        mount = mount_at(str(self.target(digest)), mounts)
        record = self.state.record(digest)
        if mount is not None:
            binds = [entry.target for entry in mounts if entry.device == mount.device and entry is not mount]
            if binds:
                raise BusyError(f"tree {digest} is still shown at {', '.join(binds[:5])}", hint="unmount that first")
            record = self._known(digest, record, mount)
            ensure_quiet(record, self.run_dir, self.packfs, self.runner, patience=self._patience)
            self.umount(mount)
        self.forget(digest, record)

    def forget(self, digest: str, record: MountRecord | None) -> None:
        """Clear up after a tree that is not mounted: record, pins and mountpoint."""
        if record is not None and lives_on(record):
            _log.warning("tree %s was unmounted but is still used, by an overlay or elsewhere", digest)
            self.state.set_aside(record)
        self.state.forget(digest)
        if record is not None and record.packs:
            pinned: Sequence[str] = record.packs if record.mode == NATIVE else ()
        else:  # after a reboot records are gone, pins are not
            pinned = self.pins.trees().get(digest, ())
        if pinned:
            self.pins.drop(digest, pinned, read_mounts())
        self.state.forget_stale_owners(digest)
        with contextlib.suppress(OSError):
            self.target(digest).rmdir()

    def umount(self, mount: MountEntry, *, detach: bool = False) -> None:
        """Unmount one mount. BusyError says who uses it."""
        try:
            self.runner.run("umount", target=mount.target, detach=detach)
        except OperationError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(f"{mount.target} is in use", hint=holders_hint(mount)) from error
            if error.errno not in {errno.EINVAL, errno.ENOENT}:  # those: somebody else was faster
                raise refusal(error, f"{mount.target} cannot be unmounted") from error

    # mounting

    def _ensure_mounted(self, tree: Tree, *, in_use: bool) -> None:
        digest, mounts = tree.digest, read_mounts()
        mount = mount_at(str(self.target(digest)), mounts)
        record = self.state.record(digest)
        if mount is not None:
            record = self._known(digest, record, mount)
            if self._dead(record):
                # Its reads fail at once, so nothing waits for this; binds of it stay dead until they are replaced.
                self.umount(mount, detach=True)
            elif in_use or record.mode != PACKFS or not self._whole(tree) or not self._let_go(digest):
                return
            else:  # nobody used it, so it can be native from now on
                record = None
        elif record is not None and self._adopt_bind(record, mounts):
            return
        if record is not None:
            self.forget(digest, record)
        self._make(tree)

    def _known(self, digest: str, record: MountRecord | None, mount: MountEntry) -> MountRecord:
        """The record of a mount; made up to date when its process died between the mount and the record's last word."""
        if record is not None and record.device == mount.device:
            return record
        if record is None:  # the run directory was tampered with: assume what needs most care
            record = MountRecord(digest, PACKFS, (), self.state.boot, packfs_device=packfs_device(self.run_dir))
        if mount.fstype == PORTABLE_TYPE:  # not asked, since it may be dead
            server = mount.source.removeprefix("floe:")
            record = replace(record, device=mount.device, bdi=mount.device, server=server)
        else:
            record = replace(record, **self._facts(self.runner.run("identify", target=mount.target)))
        self.state.save(record)
        return record

    def _dead(self, record: MountRecord) -> bool:
        if record.server and not is_alive(record.server):
            return True
        if record.mode != PACKFS:
            return False
        if packfs_device(self.run_dir) == record.packfs_device:
            with contextlib.suppress(UnavailableError):
                self.packfs.ping()
                return False
        try:
            return self.check(record.digest) is MountState.DEAD
        except DeadlineError:
            return False  # silent, not dead

    def _whole(self, tree: Tree) -> bool:
        return all(self.cache.is_complete(pack.id) for pack in tree.packs)

    def _let_go(self, digest: str) -> bool:
        try:
            self.unmount(digest)
        except (BusyError, DeadlineError):
            return False
        return True

    def _adopt_bind(self, record: MountRecord, mounts: list[MountEntry]) -> bool:
        """Somebody unmounted the tree but left binds of it: mount it from one, for there is one superblock a tree."""
        bind = next((entry for entry in mounts if is_mount_of(record, entry) and entry.root == "/"), None)
        if bind is None or not superblock_alive(record, mounts) or self._dead(record):
            return False
        target = self.target(record.digest)
        target.mkdir(mode=0o700, exist_ok=True)
        with _refusals(f"tree {record.digest} cannot be mounted"):
            self.runner.run("bind", source=bind.target, target=str(target), attributes=["ro"])
        return True

    def _make(self, tree: Tree) -> None:
        digest, target = tree.digest, self.target(tree.digest)
        below = ""
        if self.pins.take(tree):
            mode = NATIVE
        elif tree.packs:
            mode, below = PACKFS, self._require_packfs(tree)
        else:
            mode = METADATA
        record = MountRecord(digest, mode, tuple(pack.id for pack in tree.packs), self.state.boot, packfs_device=below)
        if mode == PACKFS:
            announce(self.run_dir, digest, record.packs)
        try:
            self.state.save(record)
            target.mkdir(mode=0o700, exist_ok=True)
            folder = self.run_dir / "packs"
            devices = [str(folder / pack.id) if mode == PACKFS else os.path.realpath(pack.data) for pack in tree.packs]
            with _refusals(f"tree {digest} cannot be mounted"):
                answer = self.placement.mount(
                    source=os.path.realpath(tree.image),
                    devices=devices,
                    target=str(target),
                    directio=mode == PACKFS,
                    read_ahead_kb=READ_AHEAD_KB,
                )
            self.state.save(replace(record, **self._facts(answer)))
        except BaseException:
            if not self.runner.hangs(str(target)):  # else it may be mounted yet: keep record and pins for the sweep
                self._undo(record)
            raise

    def _undo(self, record: MountRecord) -> None:
        mount = mount_at(str(self.target(record.digest)), read_mounts())
        if mount is not None:
            try:
                self.umount(mount)
            except FloeError as error:
                _log.warning("a mount that failed stays for the sweep: %s", error)
                return
        self.forget(record.digest, record)

    def _require_packfs(self, tree: Tree) -> str:
        device = packfs_device(self.run_dir)
        what = f"tree {tree.digest} is not whole in the node cache, and"
        if not device:
            raise UnavailableError(
                f"{what} no pack filesystem is mounted at {self.run_dir / 'packs'}", hint="start it with `floe packfs`"
            )
        try:
            self.packfs.ping()
        except UnavailableError as error:
            raise UnavailableError(f"{what} {error}", hint=error.hint) from error
        return device

    def _remove_stale_bind(self, digest: str, there: MountEntry) -> None:
        """Unmount what covers the place of a bind, if it is an earlier mount of the same tree; else BusyError."""
        if not any(is_mount_of(record, there) for _, record in self.state.lingering(digest)):
            raise BusyError(
                f"{there.target} is a mountpoint already (of {there.fstype} {there.source})",
                hint="unmount that, or choose another directory",
            )
        self.umount(there, detach=True)

    @staticmethod
    def _facts(answer: dict[str, Any]) -> dict[str, Any]:
        facts: dict[str, Any] = {key: answer[key] for key in ("device", "bdi", "directio", "server") if key in answer}
        if "loops" in answer:
            facts["loops"] = tuple((device, file) for device, file in answer["loops"])
        return facts


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except OperationError as error:
        raise refusal(error, what) from error
