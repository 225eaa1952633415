"""What a bug report needs to know of a node, as files of one archive: each collected by itself, none of them with secrets."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import floe
from floe.cli import node, status, trace
from floe.cli.redact import Redactor, is_secret_name, secrets_in_address, secrets_of
from floe.cli.settings import KEYS, PREFIX, Settings
from floe.cli.timeline import starts
from floe.store.eventlog import read_events
from floe.store.exposition import read_metrics
from floe.store.metricsaddress import parse_address

_LOG_BYTES = 2 << 20  # of each log, the latest
_LOG_LINES = 20_000
_JOURNAL_SECONDS = 20.0
_OPTIONAL = ("csi", "agent", "indexer")  # daemons that many a node does without
_UNITS = ("floe-packfs", "floe-snapshotter", "floe-node", "containerd")
_TRACES = 5  # the latest starts
_FILE_BYTES = 64 << 10  # of a file that may hold a secret
# Names alone are told of these, since they say who the node is to the store.
_OTHERS = ("AWS_", "GOOGLE_", "GCE_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT", "REQUESTS_CA", "KUBERNETES_")
_SYSCTLS = ("fs/fuse", "kernel/io_uring_disabled", "vm/overcommit_memory", "kernel/unprivileged_userns_clone")


def redactor(settings: Settings, environ: Mapping[str, str]) -> Redactor:
    """One that knows the secrets of these settings, of this environment, and of the files that either names."""
    known = secrets_of(environ) | secrets_in_address(settings.index) | secrets_in_address(settings.store)
    files = [settings.signing_key] if settings.signing_key else []
    for text in (settings.index, settings.store):
        pairs = (option.partition("=") for option in text.partition("?")[2].split("&"))
        files += [Path(value) for name, _, value in pairs if "file" in name or name == "key"]
    files += [Path(environ[name]) for name in ("GOOGLE_APPLICATION_CREDENTIALS",) if environ.get(name)]
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                content = file.read(_FILE_BYTES)
        except OSError:
            continue
        known |= {content.strip(), *(line.strip() for line in content.splitlines() if not line.startswith("-----"))}
    return Redactor(known)


def write(path: Path, settings: Settings, environ: Mapping[str, str], said: Callable[[str], object]) -> dict[str, Any]:
    """Write the archive to `path`, a new file for its owner alone; what is in it, and what could not be had. FileExistsError.

    `said` is told of each part before it is collected.
    """
    clean = redactor(settings, environ)
    errors: dict[str, str] = {}
    files: list[str] = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as out, tarfile.open(fileobj=out, mode="w:gz") as archive:

            def add(name: str, data: bytes) -> None:
                entry = tarfile.TarInfo(f"floe-debug/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
                files.append(name)

            for name, collect in _parts(settings, environ).items():
                said(name)
                try:
                    found = collect()
                except Exception as error:  # one part that fails is told, and keeps none of the others away
                    errors[name] = clean.text(f"{type(error).__name__}: {error}")
                    continue
                if found is not None:
                    add(name, _bytes(found, clean))
            summary = {
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "errors": errors,
                "files": [*files],
            }
            add("summary.json", _bytes(summary, clean))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return {"file": str(path), "bytes": path.stat().st_size, "files": files, "errors": errors}


def _bytes(found: object, clean: Redactor) -> bytes:
    if isinstance(found, str):
        return clean.text(found).encode("utf-8", "backslashreplace")
    return json.dumps(clean.value(found), indent=1, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


def _parts(settings: Settings, environ: Mapping[str, str]) -> dict[str, Callable[[], object]]:
    """By file name, what collects it: a text, or what JSON holds; None: there is none."""
    events = settings.run_dir / "events"
    parts: dict[str, Callable[[], object]] = {
        "settings.json": lambda: {key: _plain(getattr(settings, key)) for key in KEYS},
        "environment.json": lambda: _environment(environ),
        "versions.json": _versions,
        "kernel.json": _kernel,
        "status.json": lambda: status.collect(settings),
        "events.json": lambda: read_events(settings.run_dir) if events.exists() else None,
        "traces.json": lambda: _traces(settings),
        "state.json": lambda: _state(settings.run_dir),
        "mountinfo.txt": lambda: _mounts(settings),
    }
    for daemon in ("packfs", "snapshotter", *_OPTIONAL):
        parts[f"metrics/{daemon}.txt"] = partial(_metrics, settings, daemon)
    for unit in _UNITS:
        parts[f"logs/{unit}.txt"] = partial(_journal, unit)
    parts["logs/packfs.log"] = partial(_tail, settings.run_dir / "packfs.log")
    return parts


def _metrics(settings: Settings, daemon: str) -> str | None:
    address = settings.metrics(daemon)
    if address is None:
        return None
    place = parse_address(address)
    if daemon in _OPTIONAL and isinstance(place, Path) and not place.exists():
        return None
    return read_metrics(address)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _environment(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Floe's variables; of those that others go by the names alone."""
    found: dict[str, str | None] = {}
    for name, value in sorted(environ.items()):
        if name.startswith(PREFIX) and not is_secret_name(name):
            found[name] = value
        elif name.startswith((PREFIX, *_OTHERS)):
            found[name] = None
    return found


def _versions() -> dict[str, Any]:
    needed = importlib.metadata.requires("floe") or []
    names = sorted({name for text in needed if "extra ==" not in text for name in [_name(text)]})
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"floe": floe.__version__, "python": sys.version, "packages": found, "executable": sys.executable}


def _name(requirement: str) -> str:
    end = next((n for n, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement))
    return requirement[:end]


def _kernel() -> dict[str, Any]:
    def read(path: str) -> str | None:
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError:
            return None

    sysctls = {}
    for name in _SYSCTLS:
        place = Path("/proc/sys") / name
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            sysctls[str(path.relative_to("/proc/sys"))] = read(str(path))
    systems = (read("/proc/filesystems") or "").split()
    return {
        "uname": list(os.uname()),
        "os": platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {},
        "file_systems": {name: name in systems for name in ("erofs", "fuse", "overlay", "ext4", "xfs")},
        "sysctls": sysctls,
        "memory": read("/proc/meminfo"),
        "pressure": {name: read(f"/proc/pressure/{name}") for name in ("cpu", "io", "memory")},
        "cpus": os.cpu_count(),
    }


def _traces(settings: Settings) -> list[dict[str, Any]]:
    events = read_events(settings.run_dir)
    return [trace.trace(settings, events, start).encode() for start in starts(events)[-_TRACES:]]


def _state(run_dir: Path) -> dict[str, Any]:
    """The daemons' small records, by path."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.glob("*.pid")) + sorted(run_dir.glob("*/*.json")) + [run_dir / "packs.known"]:
        if path.is_file() and path.parent.name != "trees":
            found[str(path.relative_to(run_dir))] = path.read_text(errors="replace")[:_FILE_BYTES]
    for process in node.stuck_processes(run_dir):
        found[f"process {process['pid']} hangs"] = process["what"]
    return found


def _mounts(settings: Settings) -> str:
    ours = (str(settings.run_dir), str(settings.root), *map(str, settings.cache_roots))
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return "".join(f"{line}\n" for line in lines if "erofs" in line or any(place in line for place in ours))


def _journal(unit: str) -> str | None:
    command = [
        "journalctl",
        "--quiet",
        "--no-pager",
        "--output=short-iso-precise",
        f"--lines={_LOG_LINES}",
        f"--unit={unit}",
    ]
    try:
        found = subprocess.run(command, capture_output=True, timeout=_JOURNAL_SECONDS, check=False)
    except FileNotFoundError:
        return None  # no systemd here
    return found.stdout[-_LOG_BYTES:].decode(errors="replace") or None


def _tail(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return None
