"""The kernel: what it has, and what of it is set against Floe. The roots of proc and sys are arguments for tests."""

from __future__ import annotations

import json
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from floe.doctor.finding import ERROR, OK, SKIPPED, WARNING, Finding, Node
from floe.mount.probe import probe
from floe.mount.runner import MountRunner, OperationError
from floe.store.cache.durable import current_boot_id

_LEAST = (5, 16)  # EROFS with several devices
_TIMEOUTS = ("default_request_timeout", "max_request_timeout")
_PROBE_SECONDS = 10.0
_ZEROS = "this kernel reads zeros"


def features(
    proc: Path = Path("/proc"),
    dev: Path = Path("/dev"),
    release: str | None = None,
    modules: Path = Path("/lib/modules"),
) -> Iterator[Finding]:
    """Its version, and the file systems it has or can load."""
    release = release or platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < _LEAST:
        mend = "install a kernel of 5.16 or later"
        yield Finding("kernel", ERROR, f"Linux {release} cannot mount EROFS with several devices", mend)
    else:
        yield Finding("kernel", OK, f"Linux {release}")
    have = {line.split()[-1] for line in (proc / "filesystems").read_text().splitlines() if line.strip()}
    for name, level, without in (
        ("fuse", ERROR, "no content can be fetched when it is read"),
        ("overlay", ERROR, "no container can be started"),
        ("erofs", WARNING, "trees are mounted by the portable mount, which is slower and needs pyfuse3"),
    ):
        if name in have:
            yield Finding(name, OK, f"the kernel has {name}")
        elif _is_module(modules / release / "modules.dep", name):
            yield Finding(name, OK, f"the kernel loads {name} when it is first mounted")
        else:
            mend = f"modprobe {name} && echo {name} >> /etc/modules-load.d/floe.conf"
            yield Finding(name, level, f"{name} is not loaded: {without}", mend)
    if "fuse" in have and not (dev / "fuse").exists():
        yield Finding("fuse", ERROR, f"there is no {dev / 'fuse'}", "mknod -m 666 /dev/fuse c 10 229")


def _is_module(listed: Path, name: str) -> bool:
    """Whether a file system that is not there yet will be: mount(2) loads it, without a word of anybody's."""
    try:
        return f"/{name}.ko" in listed.read_text(errors="replace")
    except OSError:
        return False


def fuse_timeout(node: Node, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """A limit after which the kernel ends the whole connection: every container on it loses its files."""
    limits = {}
    for name in _TIMEOUTS:
        try:
            limits[name] = int((proc / "sys/fs/fuse" / name).read_text())
        except (FileNotFoundError, ValueError):
            continue
    for name, seconds in limits.items():
        if seconds:
            level = ERROR if seconds <= node.read_deadline else WARNING
            yield Finding(
                "fuse timeout",
                level,
                f"fs.fuse.{name} is {seconds} s: a read that waits longer (read_deadline: {node.read_deadline:g} s) ends the "
                "pack filesystem for all containers",
                f"sysctl -w fs.fuse.{name}=0 && echo fs.fuse.{name}=0 >> /etc/sysctl.d/99-floe.conf",
            )
    if not any(limits.values()):
        yield Finding("fuse timeout", OK, "no limit on requests" if limits else "this kernel has no limit on requests")


def short_files(node: Node) -> Iterator[Finding]:
    """Whether this kernel fills what is missing of a file below EROFS with zeros, and mounts files at all."""
    for folder in node.cache_dirs:
        yield from _short_files(node, folder)


def _short_files(node: Node, folder: Path) -> Iterator[Finding]:
    check = "file-backed EROFS"
    if not folder.is_dir():
        yield Finding(check, SKIPPED, f"there is no cache directory {folder} to try it in")
        return
    noted = _noted(node, folder)
    if noted is None and not node.may_write:
        yield Finding(check, SKIPPED, "not tried since the last boot; --probe-writes tries it in the cache directory")
        return
    if noted is None:
        with tempfile.TemporaryDirectory(prefix="floe-doctor-") as stuck:
            try:
                found = probe(MountRunner(_PROBE_SECONDS, Path(stuck)), folder)
            except OperationError as error:
                yield Finding(check, WARNING, f"not tried: {error}", "modprobe erofs")
                return
        noted = (found.files, found.why)
    files, why = noted
    if files:
        yield Finding(check, OK, "files are mounted straight, and a short one gives an error")
    elif why.startswith(_ZEROS):
        yield Finding(
            check, WARNING, f"{why}; loop devices are put below trees instead", "install Linux 6.12.117, 7.0 or later"
        )
    else:
        mend = "put cache_dir on ext4 or xfs of a local disk"
        yield Finding(check, WARNING, f"{why}; loop devices are put below trees instead", mend)


def _noted(node: Node, folder: Path) -> tuple[bool, str] | None:
    """What the mounter found out since the last boot (floe.mount.placement), without asking the kernel again."""
    try:
        path = node.run_dir / "probes" / f"{folder.stat().st_dev}.json"
        found = json.loads(path.read_bytes())
        return (bool(found["files"]), str(found["why"])) if found["boot"] == current_boot_id() else None
    except (OSError, ValueError, KeyError):
        return None
