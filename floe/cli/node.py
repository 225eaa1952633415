"""What can be learnt about this node from outside: daemons' sockets, the mount table, the cache on disk.

Nothing here creates anything, and nothing waits for long.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from floe.cli.settings import Settings
from floe.store import mounttable
from floe.store.errors import DeadlineError, FloeError

SNAPSHOTTER_SOCKET = "snapshotter-status.sock"
_TIMEOUT = 2.0  # seconds
_INDEX_TIMEOUT = 5.0  # seconds: a cluster is several connections, with TLS
_MAX_LINE = 1 << 20  # bytes


def packfs_status(settings: Settings) -> dict[str, Any]:
    """What the pack filesystem's worker says; `running` False with the reason when it says nothing."""
    from floe.protos.packfs_control import PackfsClient  # noqa: PLC0415 - lazy: keeps --help fast

    keeper = read_pid(settings.run_dir / "keeper.pid")
    try:
        answer = PackfsClient(settings.run_dir, timeout=_TIMEOUT).status()
    except FloeError as error:
        state = "its worker does not answer" if keeper else "not running"
        return {"running": False, "state": state, "keeper_pid": keeper, "error": str(error)}
    answer.pop("ok", None)
    return {"running": True, "state": "running", "keeper_pid": keeper, **answer}


def snapshotter_status(run_dir: Path) -> dict[str, Any]:
    """The line that the snapshotter answers on its status socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT)
        try:
            connection.connect(str(run_dir / SNAPSHOTTER_SOCKET))
            with connection.makefile("rb") as reader:
                answer = json.loads(reader.readline(_MAX_LINE))
        except (FileNotFoundError, ConnectionRefusedError):
            return {"running": False, "state": "not running"}
        except (OSError, ValueError) as error:
            return {"running": False, "state": "does not answer", "error": str(error)}
    return {"running": True, "state": "running", **answer}


def tree_mounts(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Each mounted tree: where its data come from, where it is shown, and the models mounted by name.

    From the mount table and the mounter's records alone, so that nothing can hang.
    """
    run_dir = run_dir.resolve()
    home = f"{run_dir}/trees/"
    mounts = mounttable.mounts()
    models = [found for path in sorted((run_dir / "models").glob("*.json")) if (found := _json(path))]
    for mount in mounts:
        by = "portable" if mount.fstype == mounttable.PORTABLE_TYPE else "erofs"
        if mount.fstype in mounttable.TREE_TYPES and mount.target.startswith(home):
            digest = mount.target.removeprefix(home)
            yield {
                "by": by,
                "tree": digest,
                "mode": _json(run_dir / "mounts" / f"{digest}.json").get("mode", "unknown"),
                "at": mount.target,
                "uses": [m.target for m in mounts if m.device == mount.device and m.target != mount.target],
                "models": {m["mountpoint"]: m["model"] for m in models if m.get("tree") == digest},
            }
    for model in models:  # of a user who is not root
        if model.get("server") and any(
            m.target == model["mountpoint"] and m.fstype == mounttable.PORTABLE_TYPE for m in mounts
        ):
            place = model["mountpoint"]
            yield {
                "by": "portable",
                "tree": model["tree"],
                "mode": "store",
                "at": place,
                "uses": [place],
                "models": {place: model["model"]},
            }


def stuck_processes(run_dir: Path) -> list[dict[str, Any]]:
    """Mount processes that hang in the kernel, and what they were told to do."""
    from floe.mount.runner import MountRunner  # noqa: PLC0415 - lazy: keeps --help fast

    stuck = MountRunner(_TIMEOUT, run_dir / "stuck").stuck()
    return [{"pid": pid, "what": what} for pid, what in sorted(stuck.items())]


def cache_status(settings: Settings) -> dict[str, Any]:
    """What lies in the node cache, counted on the disk; nothing is created.

    Sums, of those `directories` that are there; the `path` is the first one's.
    """
    directories = [_directory_status(settings, root) for root in settings.cache_roots]
    there = [directory for directory in directories if directory["exists"]]
    found: dict[str, Any] = {"path": str(settings.cache_dir), "exists": bool(there)}
    for key in there[0] if there else ():
        if key.endswith("_bytes") or key in ("trees", "packs", "complete_packs", "pinned_packs"):
            found[key] = sum(directory[key] for directory in there)
    return {**found, "directories": directories}


def _directory_status(settings: Settings, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(root), "exists": root.is_dir()}
    if not found["exists"]:
        return found
    from floe.store.cache.group import disk_of  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        disk, device = os.statvfs(root), root.stat().st_dev
    except OSError as error:
        return {**found, "exists": False, "problem": error.strerror}
    sharers = sum(disk_of(other) == device for other in settings.cache_roots)
    total = disk.f_blocks * disk.f_frsize
    packs = [folder for folder in _children(root / "packs") if folder.is_dir()]
    return {
        **found,
        "size_bytes": settings.cache_size.of(total // sharers),
        "min_free_bytes": settings.cache_min_free.of(total),
        "disk_bytes": total,
        "disk_free_bytes": disk.f_bavail * disk.f_frsize,
        "disk_problem": _disk_problem(disk),
        "used_bytes": sum(_allocated(folder / "data") for folder in packs),
        "trees": sum(1 for _ in _children(root / "trees")),
        "packs": sum((folder / "data").exists() for folder in packs),
        "complete_packs": sum((folder / "complete").exists() for folder in packs),
        "pinned_packs": sum(any(True for _ in _children(folder / "pins")) for folder in packs),
    }


def _disk_problem(disk: os.statvfs_result) -> str:
    """Why nothing can be written to a file system, as far as that shows; reads go on without the cache then."""
    if disk.f_flag & os.ST_RDONLY:
        return "its disk is read-only"
    if not disk.f_bavail:
        return "its disk is full"
    return "its disk has no inodes left" if disk.f_files and not disk.f_favail else ""


def index_status(settings: Settings) -> dict[str, Any]:
    """The state of the index; what it holds of the store only when the store answers too."""
    from floe.store.bounded import Bounded  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index.status import index_status as ask  # noqa: PLC0415 - likewise

    uuid = None
    if settings.index.startswith("redis"):
        with suppress(FloeError):
            late = DeadlineError("the store does not answer")
            uuid = Bounded("store-status", 1).call(lambda: _store_uuid(settings), _TIMEOUT, late)
    return ask(settings.index, uuid, _INDEX_TIMEOUT)


def index_denied(settings: Settings, *, writes: bool) -> list[str]:
    """Commands that the index does not let this user give. UnavailableError."""
    from floe.store.index.status import index_denied as ask  # noqa: PLC0415 - lazy: keeps --help fast

    return ask(settings.index, _INDEX_TIMEOUT, writes=writes)


def notes_denied(settings: Settings) -> list[str]:
    """Commands by which an agent says how this node is, and that the index does not let this user give. UnavailableError."""
    from floe.store.index.status import index_denied as ask  # noqa: PLC0415 - lazy: keeps --help fast

    return ask(settings.index, _INDEX_TIMEOUT, writes=False, notes=True)


def agent_state(run_dir: Path) -> tuple[bool, int | None]:
    """Whether an agent was started here since the boot and not ended in good order, and its process id if it lives."""
    path = run_dir / "agent.pid"
    return path.exists(), read_pid(path)


def trust_status(settings: Settings) -> dict[str, Any]:
    """Whose signatures count here by the settings: the ids of the keys, none: nothing need be signed; or why they cannot be read."""
    from floe.cli.context import vouching_of  # noqa: PLC0415 - lazy: keeps --help fast

    try:
        vouching = vouching_of(settings, trusting=True)
    except FloeError as error:
        return {"keys": [], "error": str(error)}
    return {"keys": [] if vouching is None or vouching.trust is None else list(vouching.trust.ids), "error": None}


def _store_uuid(settings: Settings) -> str:
    from floe.store import layout  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.objects import open_store  # noqa: PLC0415 - likewise
    from floe.store.records import StoreRecord  # noqa: PLC0415 - likewise

    with closing(open_store(settings.store, retry=False)) as store:
        return StoreRecord.decode(store.get(layout.STORE_KEY), layout.STORE_KEY).uuid


def read_pid(path: Path) -> int | None:
    """The process id in a pid file, when such a process is alive."""
    with suppress(OSError, ValueError):
        pid = int(path.read_text().strip())
        if Path(f"/proc/{pid}").exists():
            return pid
    return None


def _json(path: Path) -> dict[str, Any]:
    """The object in a small file of ours; empty when there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _children(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return ()


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
