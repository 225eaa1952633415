"""Units: installed, enabled, started, and replaced by those of another version under containers that read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bootstrap.environment import COMMAND, CURRENT, clean
from bootstrap.errors import NodeError
from bootstrap.record import Record
from bootstrap.settings import FILE
from bootstrap.system import booted, property_of, read, run, say, systemctl

_HERE = Path(__file__).resolve().parent
UNITS = _HERE.parent / "systemd"  # in a checkout, and beside this program where it was installed to
PLACE = Path("/etc/systemd/system")
NODE, PACKFS, SNAPSHOTTER = "floe-node.service", "floe-packfs.service", "floe-snapshotter.service"
AGENT = "floe-agent.service"  # decides by itself whether there is anything for it to do
DAEMONS = (PACKFS, SNAPSHOTTER)
CSI = "floe-csi.service"  # where --csi asks for it
_RUN = Path("/run/floe")
_START = (
    4000.0  # seconds: the pack filesystem waits for a planted cache, which floe-planted.service may copy for an hour
)
_PATIENCE = 90.0  # seconds for a successor to serve


def unit_files(asked: Mapping[str, Any]) -> dict[str, bytes]:
    """Every unit that is asked for, by name. NodeError when they are not where they belong."""
    found = {path.name: path.read_bytes() for path in sorted(UNITS.glob("*")) if path.is_file()}
    wanted = (*DAEMONS, AGENT, CSI) if asked.get("csi") else (*DAEMONS, AGENT)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise NodeError(f"there is no {UNITS}/{missing[0]}", "run the bootstrap-node.sh of a whole checkout")
    if not asked.get("csi"):
        found.pop(CSI, None)
    return {**found, NODE: (_HERE / NODE).read_bytes()}


def install(record: Record) -> bool:
    """Have the units there and enabled; whether anything changed."""
    changed = False
    files = unit_files(record.asked)
    for name, data in files.items():
        changed = record.put(PLACE / name, data) or changed
    if CSI not in files and str(PLACE / CSI) in record.data["files"]:
        _take_away(CSI, record)
        changed = True
    enabled = [name for name in (NODE, *DAEMONS, AGENT, CSI) if name in files and not _is_enabled(name)]
    if enabled:
        record.data["enabled"] = sorted({*record.data.get("enabled", ()), *enabled})
        record.save()
        systemctl("enable", *enabled)
    return changed


def _take_away(name: str, record: Record) -> None:
    """A unit that is no longer asked for."""
    if booted():
        _stop(name)
    if name in record.data.get("enabled", ()):
        systemctl("disable", name)
        record.data["enabled"].remove(name)
    record.take_back(str(PLACE / name))
    record.data.pop("running_csi", None)
    record.save()


def volumes() -> list[str]:
    """Where the CSI driver has models mounted for pods: without it no kubelet can unmount them."""
    found = []
    for path in sorted(_RUN.glob("models/*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            data = json.loads(read(path))
            found += [str(data["mountpoint"])] if data["volume"] else []
    return found


def check_volumes(before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """NodeError when the CSI driver shall go, and pods have volumes of it."""
    if before.get("csi") and not asked.get("csi") and (left := volumes()):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise NodeError(
            f"{len(left)} volumes of pods are mounted by the CSI driver: {', '.join(left[:5])}{more}",
            "drain the node of the pods that have them, then run this again",
        )


def _is_enabled(name: str) -> bool:
    return systemctl("is-enabled", "--quiet", name, check=False).returncode == 0


def state(names: Sequence[str] = DAEMONS) -> str:
    """A digest of what running daemons would differ by: program, settings, units and their drop-ins, which name secrets."""
    total = hashlib.sha256(os.path.realpath(CURRENT).encode())
    drop_ins = (path for name in names for path in sorted((PLACE / f"{name}.d").glob("*.conf")))
    for path in (FILE, *(PLACE / name for name in names), *drop_ins):
        total.update(read(path).encode() + b"\0")
    return total.hexdigest()


def start(record: Record) -> list[str]:
    """Have the daemons run, of this version and by these settings. Containers read on meanwhile. What was done; NodeError."""
    systemctl("daemon-reload")
    active = [name for name in DAEMONS if property_of(name, "ActiveState") == "active"]
    wanted = state()
    done = []
    if len(active) == len(DAEMONS) and record.data.get("running") != wanted:
        _replace()
        done.append("replaced the running daemons")
    elif len(active) < len(DAEMONS):
        say("starting the daemons")
        # The unit that mounts the disks did so in this run; it is marked as done, so that they need not wait for it.
        systemctl("start", NODE, *DAEMONS, seconds=_START)
        if active:
            _replace(SNAPSHOTTER in active, PACKFS in active)
        done.append("started floe-packfs and floe-snapshotter")
    _check_running(*DAEMONS)
    agent = state((AGENT,))
    if done or record.data.get("running_agent") != agent:
        # Nothing waits for it, and it picks up what it left.
        systemctl("restart", AGENT)
        record.data["running_agent"] = agent
    record.data["running"] = wanted
    record.save()
    if record.asked.get("csi"):
        done += _start_csi(record)
    return done


def _start_csi(record: Record) -> list[str]:
    """Have the CSI driver run, of this version and by these settings; volumes are not touched by that."""
    wanted, done = state((CSI,)), []
    if property_of(CSI, "ActiveState") != "active":
        say("starting the CSI driver")
        systemctl("start", CSI)
        done.append("started floe-csi")
    elif record.data.get("running_csi") != wanted:
        say("replacing the CSI driver")
        systemctl("restart", CSI)
        done.append("replaced the running CSI driver")
    _check_running(CSI)
    record.data["running_csi"] = wanted
    record.save()
    return done


def _check_running(*names: str) -> None:
    for name in names:
        if property_of(name, "ActiveState") != "active":
            raise NodeError(f"{name} does not run", f"journalctl -u {name} says why")


def _replace(snapshotter: bool = True, packfs: bool = True) -> None:  # noqa: FBT001, FBT002 - which of the two
    """One process after the other: the keeper hands its mount over by way of systemd's store, the worker to its successor."""
    if snapshotter:
        say("replacing the snapshotter")
        systemctl("restart", SNAPSHOTTER)
    if packfs:
        say("replacing the pack filesystem")
        keeper = property_of(PACKFS, "MainPID")
        if keeper in ("", "0") or keeper != read(_RUN / "keeper.pid").strip():
            raise NodeError(
                f"{_RUN}/keeper.pid does not name the process of {PACKFS}",
                "systemctl status floe-packfs; drain the node, then restart it",
            )
        worker = read(_RUN / "worker.pid").strip()
        os.kill(int(keeper), signal.SIGKILL)
        _wait(lambda: property_of(PACKFS, "MainPID") not in ("", "0", keeper) and _serves())
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(worker), signal.SIGTERM)
        _wait(lambda: read(_RUN / "worker.pid").strip() not in ("", worker) and _serves())


def _wait(good: Callable[[], bool]) -> None:
    until = time.monotonic() + _PATIENCE
    while not good():
        if time.monotonic() > until:
            raise NodeError(
                "the pack filesystem's successor does not serve",
                "journalctl -u floe-packfs says why; readers wait meanwhile",
            )
        time.sleep(0.2)


def _serves() -> bool:
    done = run(COMMAND, "status", "--json", check=False, seconds=60, environ=clean())
    try:
        return bool(json.loads(done.stdout)["packfs"]["running"])
    except (ValueError, KeyError):
        return False


# undo


def stop() -> None:
    """End the daemons, those that mount first. NodeError when one of them stays, for something uses it."""
    for name in (AGENT, CSI, SNAPSHOTTER, PACKFS, NODE):
        _stop(name)


def _stop(name: str) -> None:
    if property_of(name, "LoadState") == "loaded":
        systemctl("stop", name)
        if property_of(name, "ActiveState") not in ("inactive", "failed"):
            raise NodeError(f"{name} does not end", f"journalctl -u {name} says what still uses it")


def disable(record: Record) -> None:
    """No longer at boot."""
    enabled: Iterable[str] = record.data.get("enabled", [])
    there = [name for name in enabled if (PLACE / name).exists()]
    if there:
        systemctl("disable", *there)
    record.data["enabled"] = []
    record.save()
