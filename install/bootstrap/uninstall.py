"""All of it taken back, in the order in which things need each other; a second run goes on where one was interrupted."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bootstrap import containerd, environment, services, settings, storage
from bootstrap.errors import NodeError
from bootstrap.node import mounts_from
from bootstrap.plan import written_by_us
from bootstrap.record import Record
from bootstrap.system import booted, read, run, say, systemctl, write_file

_STORE = Path("/var/lib/floe/store")
_INDEX = Path("/var/lib/floe/index.db")
_DROP_IN = services.PLACE / "containerd.service.d/50-floe.conf"  # install/gke/extras.sh puts it there
_TREES = "/run/floe/trees"  # a mount of its own, so that what is mounted in it does not spread; the daemons leave it
_SHOWN = 40  # lines of a message
_DRAIN = (
    "drain the node, stop kubelet if it runs (else it makes pods anew), crictl rmp -fa, crictl rmi --all, "
    "floe umount what floe model mount mounted; then run this again"
)


def describe(record: Record) -> list[str]:
    """What will be taken back; nothing where nothing was done."""
    if not record.exists:
        return []
    lines = []
    if record.data.get("containerd"):
        lines.append("take Floe out of containerd's configuration, and restart containerd")
    lines.append("stop the daemons, and take away their units")
    lines += [f"put back or remove {path}" for path in sorted(record.data["files"])]
    lines += [f"remove the cache {path}" for path in record.data.get("caches", ())]
    if record.data.get("formatted") or record.data["formatting"]:
        lines.append("empty the disks that were formatted")
    lines += [f"remove {path}" for path in record.data.get("state", ()) if Path(path).exists()]
    lines.append(f"remove Floe from {environment.OPT}")
    return lines


def check(record: Record) -> None:
    """NodeError when something still needs Floe: nothing was changed."""
    if not booted() or not environment.COMMAND.exists():
        return
    if _DROP_IN.exists():
        raise NodeError(
            f"{_DROP_IN} puts Floe back into containerd's configuration at each start of containerd",
            "install/gke/extras.sh remove / && systemctl daemon-reload; then run this again",
        )
    if record.data.get("containerd"):
        # Before the mounts: people know containers and images by their names, mounts by none.
        _check_needed(containerd.unconfigure(record.asked, dry_run=True))
    services.check_volumes({"csi": True}, {})  # from their files: whether a daemon answers or not
    done = run(environment.COMMAND, "status", "--json", check=False, environ=environment.clean())
    try:
        mounts = json.loads(done.stdout)["mounts"]
    except (ValueError, KeyError):
        return
    uses = [str(use) for mount in mounts for use in mount["uses"] or [mount["tree"]]]
    if uses:
        more = f" and {len(uses) - 5} more" if len(uses) > 5 else ""
        raise NodeError(
            f"{len(uses)} uses of Floe's mounts are left: {', '.join(uses[:5])}{more}",
            _DRAIN,
        )


def _check_needed(answer: Mapping[str, Any]) -> None:
    """NodeError that lists the containers and images which would not start without Floe, as its command found them."""
    stranded = answer.get("stranded", {})  # an older version that is installed says nothing of them
    containers, images = stranded.get("containers", ()), stranded.get("images", ())
    lines = [f"container {c['id'][:13]} of {c['image']} ({c['namespace']})" for c in containers]
    lines += [f"image {i['name']} ({i['namespace']})" for i in images]
    if lines:
        counts = f"{len(containers)} containers and {len(images)} images"
        more = [f"and {len(lines) - _SHOWN} more: floe containerd unconfigure --dry-run --json lists them"]
        shown = [*lines[:_SHOWN], *(more if len(lines) > _SHOWN else [])]
        raise NodeError(
            "\n  ".join([f"{counts} need Floe and would not start without it; nothing was changed", *shown]), _DRAIN
        )


def uninstall(record: Record) -> dict[str, Any]:
    """Take it back. What was done and what stayed, for a report. NodeError: it stopped there, and the next run goes on."""
    done: list[str] = []
    notes: list[str] = []
    if record.data.get("containerd"):
        if environment.COMMAND.exists():
            # That a restart is due is durable first: whoever is interrupted afterwards finds nothing left to take out.
            if containerd.unconfigure(record.asked, dry_run=True)["changed"]:
                record.data["restart_containerd"] = True
                record.save()
            answer = containerd.unconfigure(record.asked)
            notes += answer["notes"]
            if answer["changed"]:
                done.append(f"took Floe out of {answer['file']}")
        record.data["containerd"] = False
        record.save()
    if booted():
        if record.data.get("restart_containerd"):
            done.append(containerd.restart())
            _check_taken_out(record)
            record.data.pop("restart_containerd")
            record.save()
        say("stopping the daemons")
        services.stop()
        _check_unmounted()
    services.disable(record)
    notes += _take_settings_out(record)
    for path in sorted(record.data["files"]):
        note = record.take_back(path)
        if note:
            notes.append(note)
    if booted():
        systemctl("daemon-reload")
    done.append("stopped the daemons; took away units, settings and program")
    notes += storage.remove(record)
    for path in record.data.get("state", []):
        _remove_state(Path(path))
    environment.remove_all()
    if _STORE.exists():
        notes.append(f"the store in {_STORE} is yours, and stays")
    packages = record.data.get("packages", [])
    if packages:
        notes.append(f"these packages were installed, and stay: {', '.join(packages)}; apt-get purge takes them away")
    record.forget()
    return {"done": done, "notes": notes, "warnings": [], "next": [], "exit_status": 0}


def _take_settings_out(record: Record) -> list[str]:
    """Of a settings file that people changed, the lines that this program wrote; one that they left alone is taken back whole."""
    if not record.is_edited(settings.FILE):
        return []
    text, ours = read(settings.FILE), record.data.get("settings", {})
    file = settings.keys_of(text)
    rest = settings.merge(text, {}, tuple(key for key in file if written_by_us(key, file, ours)))
    if rest.strip() in ("", settings.HEADER.strip()):
        settings.FILE.unlink()
        notes = []
    else:
        write_file(settings.FILE, rest.encode(), stat.S_IMODE(settings.FILE.stat().st_mode))
        notes = [f"{settings.FILE} was changed since it was written: what is not this program's stays in it"]
    del record.data["files"][str(settings.FILE)]
    record.save()
    return notes


def _check_taken_out(record: Record) -> None:
    """NodeError when containerd, restarted, has Floe in its configuration again: its daemons must stay then."""
    if environment.COMMAND.exists() and containerd.unconfigure(record.asked, dry_run=True)["changed"]:
        record.data["containerd"] = True
        record.save()
        raise NodeError(
            "containerd's configuration has Floe again, after a restart of containerd",
            "systemctl cat containerd shows what puts it back; take that away, systemctl daemon-reload, then run this again",
        )


def _check_unmounted() -> None:
    """NodeError when a mount of Floe's is left although nobody serves it."""
    left = _left()
    if left == [_TREES]:
        run("umount", _TREES, check=False)
        left = _left()
    if left:
        raise NodeError(
            f"still mounted: {', '.join(left)}",
            "floe umount them while floe-packfs runs, or reboot; then run this again",
        )


def _left() -> list[str]:
    return [one.target for one in mounts_from(read(Path("/proc/self/mountinfo"))) if _is_floes(one.target)]


def _is_floes(target: str) -> bool:
    return target.startswith(("/run/floe/", "/var/lib/floe/snapshotter/"))


def _remove_state(path: Path) -> None:
    if path == _INDEX:
        if not _STORE.exists():  # the index of a store that stays, stays with it
            for one in path.parent.glob(path.name + "*"):
                one.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
